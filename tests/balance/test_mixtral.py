"""The pooled form of Mixtral's and MixLoRA's code: golden values, the reference, and how it differs from Switch's."""

from __future__ import annotations

import pytest
import torch

from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.routing.decision import Routing
from moelora.selection.top_k import TopK
from tests.balance.layers import MIXTRAL, SWITCH, TOP_2, Layers, exact, loss_of, record
from tests.routing.golden import (
    ALL_VALID_T,
    LOGITS_TE,
    MIXLORA_AUX,
    MIXLORA_AUX_LAST_TOKEN_MASKED,
    golden_routing,
)


def test_mixlora_golden() -> None:
    """The pooled form of MixLoRA's code."""
    assert exact(loss_of(MIXTRAL, record(golden_routing(TOP_2)))) == MIXLORA_AUX


def test_mixlora_golden_with_the_last_token_masked() -> None:
    valid_T = torch.tensor([True, True, False])
    assert exact(loss_of(MIXTRAL, record(golden_routing(TOP_2), valid_T))) == MIXLORA_AUX_LAST_TOKEN_MASKED


def test_the_reference_gives_the_golden_values() -> None:
    assert exact(reference.mixtral_balance_loss(LOGITS_TE[None], 2, ALL_VALID_T)) == MIXLORA_AUX
    masked = reference.mixtral_balance_loss(LOGITS_TE[None], 2, torch.tensor([True, True, False]))
    assert exact(masked) == MIXLORA_AUX_LAST_TOKEN_MASKED


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_equals_the_reference(top_k: int) -> None:
    layers = Layers(TopK(k=top_k))
    records = layers.records()
    found = loss_of(MIXTRAL, *records)
    logits_LTE = torch.stack([r.routing.logits_TE for r in records])
    expected = reference.mixtral_balance_loss(logits_LTE, top_k, layers.valid_T)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_pooling_is_not_the_mean_over_layers() -> None:
    records = Layers().records()
    alone = torch.stack([loss_of(MIXTRAL, r) for r in records]).mean()
    assert not torch.allclose(loss_of(MIXTRAL, *records), alone, rtol=1e-3)


def test_on_one_layer_it_is_k_times_the_switch_form() -> None:
    for top_k in (1, 2, 4):
        (found,) = Layers(TopK(k=top_k), L=1).records()
        torch.testing.assert_close(loss_of(MIXTRAL, found), top_k * loss_of(SWITCH, found))


@pytest.mark.parametrize("chosen", [1, 2, None], ids=str)
def test_perfect_balance_is_the_number_of_choices(chosen: int | None) -> None:
    E = 6
    ids_TK = None if chosen is None else (torch.arange(E)[:, None] + torch.arange(chosen)) % E
    uniform_TE = torch.full((E, E), 1 / E)
    routing = Routing(torch.zeros(E, E), uniform_TE, torch.full((E, chosen or E), 1 / (chosen or E)), ids_TK)
    assert exact(loss_of(MIXTRAL, record(routing))) == (chosen or 1)


def test_layers_of_different_sizes_are_refused() -> None:
    few, many = Layers(E=3, L=1).records()[0], Layers(E=8, L=1).records()[0]
    records = [record(few.routing, few.valid_T, "few"), record(many.routing, many.valid_T, "many")]
    with pytest.raises(ConfigError, match=r"\[3, 8\] experts; use 'switch'"):
        loss_of(MIXTRAL, *records)
