"""What all balance losses have in common: the properties that the trainers rely on.

Shape suffixes: T tokens, E experts, L layers.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.losses import balance_losses
from moelora.balance.totals import RoutingTotals
from moelora.choices import kinds
from moelora.errors import ConfigError
from moelora.routing.stack import stack_records
from tests.balance.layers import CV_SQUARED, ENTROPY, MIXTRAL, SWITCH, THRESHOLD, Layers, Z, loss_of, record

# Each loss with the routings of `layers.ROUTINGS` that it is compared on.
CASES = [
    *(
        (choice, name)
        for choice in (SWITCH, MIXTRAL, Z, CV_SQUARED)
        for name in ("top-2", "dense", "sigmoid", "learned-threshold")
    ),
    *((ENTROPY, name) for name in ("top-2", "dense", "learned-threshold")),
    (THRESHOLD, "learned-threshold"),
]
LOSSES = pytest.mark.parametrize(("choice", "name"), CASES, ids=[f"{choice.kind}-{name}" for choice, name in CASES])


def test_every_loss_is_compared() -> None:
    known: dict[str, Any] = dict(kinds("balance"))
    losses = {kind for kind, choice in known.items() if choice(coef=0.1).has_loss}
    # the losses of a tree of experts need one (tests/presets/test_smore.py, test_smore_noise.py); LoRAMoE's is not
    # linear (test_localized.py); those of the experts' weights and of two forwards have no part in routing
    # (test_orthogonal.py, tests/presets/test_thor.py)
    others = {"tree_switch", "tree_cv_squared", "localized", "orthogonal", "consistency"}
    assert losses == {choice.kind for choice, _ in CASES} | others


def assert_same(layers: Layers, found: Tensor, expected: Tensor) -> None:
    """Value and gradient of every tensor."""
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


@LOSSES
def test_padding_changes_neither_value_nor_gradient(choice: Balance, name: str) -> None:
    layers = Layers.routed(name)
    layers.valid_T = torch.arange(21) < 13
    assert_same(layers, loss_of(choice, *layers.records()), loss_of(choice, *layers.records(slice(0, 13))))


@LOSSES
@pytest.mark.parametrize("cuts", [(7, 14), (1, 2, 20), (10,)], ids=str)
def test_shares_add_up_to_the_loss_of_the_union(choice: Balance, name: str, cuts: tuple[int, ...]) -> None:
    layers = Layers.routed(name)
    edges = [0, *cuts, 21]
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    totals = RoutingTotals.of(stack_records(layers.records(parts[0])))
    for part in parts[1:]:
        totals = totals + RoutingTotals.of(stack_records(layers.records(part)))
    shares = [balance_losses(layers.records(part), [choice], totals)[0] for part in parts]
    assert_same(layers, torch.stack(shares).sum(), loss_of(choice, *layers.records()))


@pytest.mark.parametrize(("choice", "name"), [(SWITCH, "top-2"), (THRESHOLD, "learned-threshold")])
def test_the_mean_of_parts_is_another_loss(choice: Balance, name: str) -> None:
    """Why totals are taken over the step: averaging the losses of micro-batches is not the loss of the batch."""
    layers = Layers.routed(name)
    whole = loss_of(choice, *layers.records())
    parts = [loss_of(choice, *layers.records(part)) for part in (slice(0, 10), slice(10, 21))]
    assert not torch.allclose(torch.stack(parts).mean(), whole, rtol=1e-3)


@LOSSES
def test_several_forwards_of_a_layer_are_one_set_of_tokens(choice: Balance, name: str) -> None:
    layers = Layers.routed(name)
    both = [*layers.records(slice(0, 8)), *layers.records(slice(8, 21))]
    assert_same(layers, loss_of(choice, *both), loss_of(choice, *layers.records()))


@LOSSES
def test_all_layers_at_once_are_the_layers_one_by_one(choice: Balance, name: str) -> None:
    """Also layers of other tokens and other numbers of experts, and some that ran twice."""
    layers, others = Layers.routed(name), Layers.routed(name, T=9, L=2, E=5 if choice is MIXTRAL else 3)
    of_others = [record(r.routing, r.valid_T, f"tower.{r.layer}") for r in others.records()]
    records = [*layers.records(slice(0, 8)), *of_others, *layers.records(slice(8, 21))]
    assert len(stack_records(records)) == 3
    totals = RoutingTotals.of(stack_records(records))
    alone = [balance_losses([each], [choice], totals)[0] for each in records]
    for part in (layers, others):
        assert_same(part, loss_of(choice, *records), torch.stack(alone).sum())


@LOSSES
def test_a_batch_of_padding_only_gives_zero(choice: Balance, name: str) -> None:
    layers = Layers.routed(name)
    loss = loss_of(choice, *layers.records(valid_T=torch.zeros(21, dtype=torch.bool)))
    assert loss.item() == 0
    assert all(grad.isfinite().all() for grad in layers.gradients(loss))


def test_losses_stay_fp32_under_autocast() -> None:
    for name, choices in (("top-2", [SWITCH, MIXTRAL, Z, ENTROPY, CV_SQUARED]), ("learned-threshold", [THRESHOLD])):
        records = Layers.routed(name).records()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = balance_losses(records, choices)
        torch.testing.assert_close(inside, balance_losses(records, choices), rtol=0, atol=0)


def test_a_loss_for_each_choice_without_its_coefficient() -> None:
    records = Layers().records()
    twice = [type(SWITCH)(coef=0.5), type(Z)(coef=3.0)]
    found = balance_losses(records, twice)
    torch.testing.assert_close(found, [loss_of(SWITCH, *records), loss_of(Z, *records)])
    assert balance_losses(records, []) == []


def test_no_records_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no routing records"):
        balance_losses([], [SWITCH])
