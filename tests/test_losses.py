"""The balance losses: golden values, the references (value and gradient), and the properties the trainers rely on.

Shape suffixes: T tokens, E experts, L layers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.config import BalanceConfig, RoutingConfig
from moelora.errors import ConfigError
from moelora.losses import (
    RoutingTotals,
    balance_losses,
    layer_losses,
    mixtral_balance_loss,
    switch_balance_loss,
    z_loss,
)
from moelora.ops import reference
from moelora.routing.decision import Routing
from moelora.routing.recorder import RoutingRecord
from moelora.routing.router import Router
from tests.routing.golden import (
    ALL_VALID_T,
    GSHARD_AUX,
    LOGITS_TE,
    MIXLORA_AUX,
    MIXLORA_AUX_LAST_TOKEN_MASKED,
    MOLA_AUX,
    SWITCH_AUX,
    Z_LOSS,
    golden_routing,
)

TOP_2 = RoutingConfig(top_k=2)
ROUTINGS = {
    "top-2": TOP_2,
    "top-1-raw": RoutingConfig(top_k=1, renormalize=False),
    "dense": RoutingConfig(top_k=None, renormalize=False),
    "sigmoid": RoutingConfig(score="sigmoid", top_k=2, bias_update_rate=1e-5),
    "capacity": RoutingConfig(top_k=2, capacity_factor=0.5, capacity_in_eval=True),
}
FORMS = pytest.mark.parametrize("form", ["switch", "mixtral"])


def exact(loss: Tensor) -> float:
    return round(loss.item(), 6)


def record(routing: Routing, valid_T: Tensor | None = None, layer: str = "layer") -> RoutingRecord:
    return RoutingRecord(
        layer, "default", routing, torch.ones(len(routing.probs_TE), dtype=torch.bool) if valid_T is None else valid_T
    )


class Layers:
    """Routers of a few layers and the tokens they read; decisions for any part of the tokens."""

    def __init__(self, config: RoutingConfig = TOP_2, *, T: int = 21, E: int = 5, L: int = 3) -> None:
        self.routers = [Router(12, E, config).eval() for _ in range(L)]
        for router in self.routers:
            torch.nn.init.normal_(router.weight, std=1.0)
        self.x_LTD = torch.randn(L, T, 12)
        self.valid_T = torch.rand(T) < 0.7

    def records(self, tokens: slice = slice(None), valid_T: Tensor | None = None) -> list[RoutingRecord]:
        valid_T = self.valid_T[tokens] if valid_T is None else valid_T
        found = []
        for i, router in enumerate(self.routers):
            x_TD = self.x_LTD[i, tokens]
            routing = router(x_TD, torch.ones(1, len(x_TD), dtype=torch.bool))
            found.append(RoutingRecord(f"layers.{i}", "default", routing, valid_T))
        return found

    def gradients(self, loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, [router.weight for router in self.routers], retain_graph=True))


def test_mixlora_golden() -> None:
    """The pooled form of MixLoRA's code."""
    assert exact(mixtral_balance_loss([record(golden_routing(TOP_2))])) == MIXLORA_AUX


def test_mixlora_golden_with_the_last_token_masked() -> None:
    valid_T = torch.tensor([True, True, False])
    assert exact(mixtral_balance_loss([record(golden_routing(TOP_2), valid_T)])) == MIXLORA_AUX_LAST_TOKEN_MASKED


def test_paper_and_switch_golden() -> None:
    """MixLoRA's paper counts the argmax (Eq. 9); so does Switch with its top-1."""
    for renormalize in (True, False):
        routing = golden_routing(RoutingConfig(top_k=1, renormalize=renormalize))
        assert exact(switch_balance_loss(routing, ALL_VALID_T)) == SWITCH_AUX


def test_mola_golden() -> None:
    """f over all k choices, divided by k: the library's convention."""
    assert exact(switch_balance_loss(golden_routing(TOP_2), ALL_VALID_T)) == MOLA_AUX


@pytest.mark.parametrize("top_k", [1, 2])
def test_gshard_golden(top_k: int) -> None:
    """GShard's `(1/E) sum_e (c_e/S) m_e` is ours times k / E^2, so its coefficients convert by a constant."""
    ours = switch_balance_loss(golden_routing(RoutingConfig(top_k=top_k)), ALL_VALID_T)
    assert exact(ours * top_k / 4**2) == GSHARD_AUX[top_k]


def test_z_loss_golden() -> None:
    assert exact(z_loss(golden_routing(TOP_2), ALL_VALID_T)) == Z_LOSS
    assert exact(reference.z_loss(LOGITS_TE, ALL_VALID_T)) == Z_LOSS


def test_the_references_give_the_golden_values() -> None:
    routing = golden_routing(TOP_2)
    assert exact(reference.switch_balance_loss(routing.probs_TE, routing.load_TE(), ALL_VALID_T)) == MOLA_AUX
    assert exact(reference.mixtral_balance_loss(LOGITS_TE[None], 2, ALL_VALID_T)) == MIXLORA_AUX
    masked = reference.mixtral_balance_loss(LOGITS_TE[None], 2, torch.tensor([True, True, False]))
    assert exact(masked) == MIXLORA_AUX_LAST_TOKEN_MASKED


@pytest.mark.parametrize("name", ROUTINGS)
def test_switch_equals_the_reference(name: str) -> None:
    layers = Layers(ROUTINGS[name])
    records = layers.records()
    balance, z = balance_losses(records, BalanceConfig(loss="switch"))
    expected = torch.stack(
        [reference.switch_balance_loss(r.routing.probs_TE, r.routing.load_TE(), r.valid_T) for r in records]
    ).mean()
    expected_z = torch.stack([reference.z_loss(r.routing.logits_TE, r.valid_T) for r in records]).mean()
    torch.testing.assert_close(balance, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z, expected_z, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(layers.gradients(balance + z), layers.gradients(expected + expected_z), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_mixtral_equals_the_reference(top_k: int) -> None:
    layers = Layers(RoutingConfig(top_k=top_k))
    records = layers.records()
    found = mixtral_balance_loss(records)
    expected = reference.mixtral_balance_loss(
        torch.stack([r.routing.logits_TE for r in records]), top_k, layers.valid_T
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_pooling_is_not_the_mean_over_layers() -> None:
    records = Layers().records()
    alone = torch.stack([mixtral_balance_loss([r]) for r in records]).mean()
    assert not torch.allclose(mixtral_balance_loss(records), alone, rtol=1e-3)


def test_on_one_layer_the_pooled_form_is_k_times_the_switch_form() -> None:
    for top_k in (1, 2, 4):
        (found,) = Layers(RoutingConfig(top_k=top_k), L=1).records()
        torch.testing.assert_close(
            mixtral_balance_loss([found]), top_k * switch_balance_loss(found.routing, found.valid_T)
        )


@pytest.mark.parametrize("name", ["top-2", "top-1-raw", "dense", "sigmoid"])
def test_perfect_balance_is_one(name: str) -> None:
    E = 6
    config = ROUTINGS[name]
    chosen = config.top_k
    ids_TK = None if chosen is None else (torch.arange(E)[:, None] + torch.arange(chosen)) % E
    uniform_TE = torch.full((E, E), 1 / E)
    routing = Routing(torch.zeros(E, E), uniform_TE, torch.full((E, chosen or E), 1 / (chosen or E)), ids_TK)
    valid_T = torch.ones(E, dtype=torch.bool)
    assert exact(switch_balance_loss(routing, valid_T)) == 1.0
    assert exact(mixtral_balance_loss([record(routing)])) == (chosen or 1)


def test_collapse_is_the_number_of_experts() -> None:
    probs_TE = torch.zeros(7, 5)
    probs_TE[:, 2] = 1
    routing = Routing(probs_TE, probs_TE, torch.ones(7, 1), torch.full((7, 1), 2))
    assert exact(switch_balance_loss(routing, torch.ones(7, dtype=torch.bool))) == 5.0


@FORMS
@pytest.mark.parametrize("name", ["top-2", "dense", "sigmoid"])
def test_padding_changes_neither_value_nor_gradient(form: Any, name: str) -> None:
    layers = Layers(ROUTINGS[name])
    config = BalanceConfig(loss=form)
    layers.valid_T = torch.arange(21) < 13
    padded = sum(balance_losses(layers.records(), config))
    alone = sum(balance_losses(layers.records(slice(0, 13)), config))
    assert isinstance(padded, Tensor)
    assert isinstance(alone, Tensor)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(layers.gradients(padded), layers.gradients(alone), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


@FORMS
@pytest.mark.parametrize("name", ["top-2", "dense", "sigmoid"])
@pytest.mark.parametrize("cuts", [(7, 14), (1, 2, 20), (10,)], ids=str)
def test_shares_add_up_to_the_loss_of_the_union(form: Any, name: str, cuts: tuple[int, ...]) -> None:
    layers = Layers(ROUTINGS[name])
    config = BalanceConfig(loss=form)
    whole = torch.stack(balance_losses(layers.records(), config))
    edges = [0, *cuts, 21]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    totals = RoutingTotals.of(layers.records(parts[0]))
    for part in parts[1:]:
        totals = totals + RoutingTotals.of(layers.records(part))
    shares = torch.stack([torch.stack(balance_losses(layers.records(part), config, totals)) for part in parts])
    torch.testing.assert_close(shares.sum(0), whole, rtol=1e-5, atol=1e-6)
    for i in (0, 1):
        for found, wanted in zip(layers.gradients(shares[:, i].sum()), layers.gradients(whole[i]), strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)


def test_the_mean_of_parts_is_another_loss() -> None:
    """Why totals are taken over the step: averaging the losses of micro-batches is not the loss of the batch."""
    layers = Layers()
    whole = balance_losses(layers.records())[0]
    parts = [balance_losses(layers.records(part))[0] for part in (slice(0, 10), slice(10, 21))]
    assert not torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-3)


def test_several_forwards_of_a_layer_are_one_set_of_tokens() -> None:
    layers = Layers()
    both = [*layers.records(slice(0, 8)), *layers.records(slice(8, 21))]
    torch.testing.assert_close(balance_losses(both), balance_losses(layers.records()), rtol=1e-5, atol=1e-6)


def test_totals_count_the_choices_of_valid_tokens() -> None:
    layers = Layers()
    totals = RoutingTotals.of(layers.records())
    assert totals.mixtures == tuple((f"layers.{i}", "default") for i in range(3))
    for counts_E, tokens, found in zip(totals.counts, totals.tokens, layers.records(), strict=True):
        assert found.routing.ids_TK is not None
        chosen = found.routing.ids_TK[layers.valid_T].flatten()
        assert counts_E.tolist() == torch.bincount(chosen, minlength=5).tolist()
        assert int(tokens) == int(layers.valid_T.sum()) == found.valid_tokens
        assert not counts_E.requires_grad


def test_choices_removed_by_expert_dropout_are_no_load() -> None:
    probs_TE = torch.rand(4, 3)
    routing = Routing(
        probs_TE,
        probs_TE,
        torch.rand(4, 2),
        torch.tensor([[0, 1], [0, 1], [0, 1], [2, 0]]),
        torch.tensor([[True, False], [True, True], [False, False], [True, True]]),
    )
    assert record(routing).counts_E().tolist() == [3, 1, 1]
    torch.testing.assert_close(record(routing).load_E(), torch.tensor([0.6, 0.2, 0.2]))


def test_no_gradient_flows_through_the_load() -> None:
    """f is a constant also where it is P itself (dense): the gradient is that of `E * sum f P` in P alone."""
    layers = Layers(ROUTINGS["dense"], L=1)
    (found,) = layers.records()
    probs_TE = found.routing.probs_TE[found.valid_T]
    f_E = probs_TE.detach().mean(0)
    expected = (5 * f_E * probs_TE.mean(0)).sum()
    loss = balance_losses([found])[0]
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(layers.gradients(loss), layers.gradients(expected), rtol=1e-4, atol=1e-7)


@FORMS
def test_a_batch_of_padding_only_gives_zero(form: Any) -> None:
    layers = Layers()
    balance, z = balance_losses(layers.records(valid_T=torch.zeros(21, dtype=torch.bool)), BalanceConfig(loss=form))
    assert balance.item() == z.item() == 0
    assert all(grad.isfinite().all() for grad in layers.gradients(balance + z))


def test_layers_of_different_sizes() -> None:
    few, many = Layers(E=3, L=1).records()[0], Layers(E=8, L=1).records()[0]
    records = [record(few.routing, few.valid_T, "few"), record(many.routing, many.valid_T, "many")]
    expected = (switch_balance_loss(few.routing, few.valid_T) + switch_balance_loss(many.routing, many.valid_T)) / 2
    torch.testing.assert_close(balance_losses(records)[0], expected)
    with pytest.raises(ConfigError, match=r"\[3, 8\] experts; use 'switch'"):
        mixtral_balance_loss(records)


def test_losses_stay_fp32_under_autocast() -> None:
    records = Layers().records()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = balance_losses(records)
    torch.testing.assert_close(inside, balance_losses(records), rtol=0, atol=0)


def test_no_records_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no routing records"):
        balance_losses([])


def test_totals_of_different_layers_do_not_add() -> None:
    layers = Layers()
    with pytest.raises(ConfigError, match="different layers"):
        RoutingTotals.of(layers.records()) + RoutingTotals.of(layers.records()[:2])


def test_layer_losses_are_given_for_every_layer() -> None:
    totals = RoutingTotals.of(Layers().records())
    assert list(layer_losses(totals, BalanceConfig())) == list(totals.mixtures)
