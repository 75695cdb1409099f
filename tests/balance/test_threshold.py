"""AdaMoLE's balance loss: the golden value, the reference with every gradient, and what it is at perfect balance."""

from __future__ import annotations

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.selection.learned_threshold import LearnedThreshold, ThresholdRouting
from tests.balance.layers import THRESHOLD, Layers, exact, loss_of, record
from tests.routing.golden import ADAMOLE_AUX, ADAMOLE_THRESHOLDS_T, ALL_VALID_T, SOFTMAX_TE, adamole_routing


def test_golden() -> None:
    assert exact(loss_of(THRESHOLD, record(adamole_routing(LearnedThreshold())))) == ADAMOLE_AUX


def test_the_reference_gives_the_golden_value() -> None:
    found = reference.threshold_balance_loss(SOFTMAX_TE, ADAMOLE_THRESHOLDS_T, ALL_VALID_T)
    torch.testing.assert_close(found, torch.tensor(ADAMOLE_AUX), rtol=0, atol=5e-6)


@pytest.mark.parametrize("max_threshold", [None, 0.6], ids=str)
def test_equals_the_reference(max_threshold: float | None) -> None:
    layers = Layers(LearnedThreshold(max_threshold=max_threshold))
    records = layers.records()
    found = loss_of(THRESHOLD, *records)
    terms = []
    for r in records:
        assert isinstance(r.routing, ThresholdRouting)
        terms.append(reference.threshold_balance_loss(r.routing.probs_TE, r.routing.threshold_T1.squeeze(1), r.valid_T))
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    grads = layers.gradients(found)
    assert len(grads) == 9  # of three tensors of three routers
    for grad, wanted in zip(grads, layers.gradients(expected), strict=True):
        assert grad.abs().max() > 0
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("E", [3, 8])
def test_what_it_is_at_perfect_balance(E: int) -> None:
    """All experts pass with p = 1 / E: `E * E * (1 / E - tau)`, which falls to 0 as tau rises to 1 / E."""
    uniform_TE = torch.full((5, E), 1 / E)
    for threshold in (0.0, 0.5 / E):
        routing = ThresholdRouting(
            torch.zeros(5, E),
            uniform_TE,
            uniform_TE,
            ids_TK=None,
            assigned_TK=uniform_TE >= threshold,
            threshold_T1=torch.full((5, 1), threshold),
        )
        expected = torch.tensor(E * E * (1 / E - threshold))
        torch.testing.assert_close(loss_of(THRESHOLD, record(routing)), expected)


def test_it_needs_a_threshold() -> None:
    with pytest.raises(ConfigError, match="'threshold' needs a threshold, which 'top_k' selection does not have"):
        MoeLoraConfig(balance={"kind": "threshold", "coef": 0.1})
