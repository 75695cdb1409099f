"""The load-balancing loss of Switch: golden values, the reference, balance and collapse."""

from __future__ import annotations

import pytest
import torch

from moelora.ops import reference
from moelora.routing.decision import Routing
from moelora.selection.top_k import TopK
from tests.balance.layers import ROUTINGS, SWITCH, TOP_2, Layers, exact, loss_of, record
from tests.routing.golden import ALL_VALID_T, GSHARD_AUX, MOLA_AUX, SWITCH_AUX, golden_routing


def test_paper_and_switch_golden() -> None:
    """MixLoRA's paper counts the argmax (Eq. 9); so does Switch with its top-1."""
    for renormalize in (True, False):
        routing = golden_routing(TopK(k=1, renormalize=renormalize))
        assert exact(loss_of(SWITCH, record(routing))) == SWITCH_AUX


def test_mola_golden() -> None:
    """f over all k choices, divided by k: the library's convention."""
    assert exact(loss_of(SWITCH, record(golden_routing(TOP_2)))) == MOLA_AUX


@pytest.mark.parametrize("top_k", [1, 2])
def test_gshard_golden(top_k: int) -> None:
    """GShard's `(1/E) sum_e (c_e/S) m_e` is ours times k / E^2, so its coefficients convert by a constant."""
    ours = loss_of(SWITCH, record(golden_routing(TopK(k=top_k))))
    assert exact(ours * top_k / 4**2) == GSHARD_AUX[top_k]


def test_the_reference_gives_the_golden_value() -> None:
    routing = golden_routing(TOP_2)
    assert exact(reference.switch_balance_loss(routing.probs_TE, routing.load_TE(), ALL_VALID_T)) == MOLA_AUX


@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_reference(name: str) -> None:
    layers = Layers.routed(name)
    records = layers.records()
    found = loss_of(SWITCH, *records)
    expected = torch.stack(
        [reference.switch_balance_loss(r.routing.probs_TE, r.routing.load_TE(), r.valid_T) for r in records]
    ).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chosen", [1, 2, None], ids=str)
def test_perfect_balance_is_one(chosen: int | None) -> None:
    E = 6
    ids_TK = None if chosen is None else (torch.arange(E)[:, None] + torch.arange(chosen)) % E
    uniform_TE = torch.full((E, E), 1 / E)
    routing = Routing(torch.zeros(E, E), uniform_TE, torch.full((E, chosen or E), 1 / (chosen or E)), ids_TK)
    assert exact(loss_of(SWITCH, record(routing))) == 1.0


def test_collapse_is_the_number_of_experts() -> None:
    probs_TE = torch.zeros(7, 5)
    probs_TE[:, 2] = 1
    routing = Routing(probs_TE, probs_TE, torch.ones(7, 1), torch.full((7, 1), 2))
    assert exact(loss_of(SWITCH, record(routing))) == 5.0


def test_no_gradient_flows_through_the_load() -> None:
    """f is a constant also where it is P itself (dense): the gradient is that of `E * sum f P` in P alone."""
    layers = Layers.routed("dense", L=1)
    (found,) = layers.records()
    probs_TE = found.routing.probs_TE[found.valid_T]
    f_E = probs_TE.detach().mean(0)
    expected = (5 * f_E * probs_TE.mean(0)).sum()
    loss = loss_of(SWITCH, found)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(layers.gradients(loss), layers.gradients(expected), rtol=1e-4, atol=1e-7)


def test_layers_of_different_sizes() -> None:
    few, many = Layers(E=3, L=1).records()[0], Layers(E=8, L=1).records()[0]
    records = [record(few.routing, few.valid_T, "few"), record(many.routing, many.valid_T, "many")]
    expected = (loss_of(SWITCH, few) + loss_of(SWITCH, many)) / 2
    torch.testing.assert_close(loss_of(SWITCH, *records), expected)
