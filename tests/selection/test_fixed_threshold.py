"""A fixed threshold: golden values, the equation, and that some expert always passes."""

from __future__ import annotations

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.selection.threshold import Threshold
from tests.routing.golden import MOLE_WEIGHTS_TE, golden_routing
from tests.routing.routers import select


def test_golden() -> None:
    routing = golden_routing(Threshold())
    torch.testing.assert_close(routing.gates_TE(), MOLE_WEIGHTS_TE, rtol=0, atol=1e-6)
    assert torch.equal(routing.load_TE() > 0, MOLE_WEIGHTS_TE > 0)


@pytest.mark.parametrize("threshold", [None, 0.1, 0.4])
def test_equals_the_equation(threshold: float | None) -> None:
    """Forward and the gradient of the logits."""
    logits_TE = torch.randn(19, 5, requires_grad=True)
    routing = select(Threshold(threshold=threshold), logits_TE.softmax(-1))
    rows = []
    for p_E in logits_TE.softmax(-1):
        passed = [p if p.item() >= (threshold or 1 / 5) else torch.zeros(()) for p in p_E]
        total = sum(passed, start=torch.zeros(()))
        rows.append(torch.stack(passed) / total if total > 0 else torch.stack(passed))
    expected_TE = torch.stack(rows)
    torch.testing.assert_close(routing.gates_TE(), expected_TE, rtol=1e-5, atol=1e-6)
    upstream_TE = torch.randn(19, 5)
    (found,) = torch.autograd.grad(routing.gates_TE(), logits_TE, upstream_TE)
    (wanted,) = torch.autograd.grad(expected_TE, logits_TE, upstream_TE)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_experts", [3, 6, 7, 10, 49])
def test_equal_scores_all_pass(num_experts: int) -> None:
    """Whatever rounding does to 1 / E."""
    routing = select(Threshold(), torch.zeros(1, num_experts).softmax(-1))
    torch.testing.assert_close(routing.gates_TE(), torch.full((1, num_experts), 1 / num_experts))


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="threshold is 0"):
        MoeLoraConfig.from_preset("adamole_fixed", threshold=0)
    with pytest.raises(ConfigError, match="'threshold' compares probabilities"):
        MoeLoraConfig(selection="threshold", scores={"kind": "linear", "activation": "sigmoid"})
