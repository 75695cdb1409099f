"""LoRAMoE's localised balance: golden values, the reference, and what it is taken over.

Shape suffixes: T tokens, N sequences, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.balance.localized import LocalizedBalance
from moelora.balance.losses import balance_losses
from moelora.balance.totals import RoutingTotals
from moelora.errors import ConfigError
from moelora.ops.reference_losses import localized_balance_loss
from moelora.routing.batch import Tokens
from moelora.routing.record import RoutingRecord
from moelora.routing.stack import stack_records
from moelora.selection.dense import Dense
from tests.balance.layers import exact, loss_of
from tests.routing.golden import LOCALIZED, LOGITS_TE, router_of
from tests.routing.routers import new_router

CHOICE = LocalizedBalance(coef=1.0)


def recorded(x_TD: Tensor, tokens: Tokens, router: torch.nn.Module, layer: str = "layer") -> RoutingRecord:
    return RoutingRecord(layer, "default", router(x_TD, tokens), tokens.valid_T)


def batch_of(lengths: list[int], tasks: list[int], width: int = 6) -> Tokens:
    valid_BS = torch.arange(width) < torch.tensor(lengths)[:, None]
    return Tokens(valid_BS, facts={"task_ids": torch.tensor(tasks)})


@pytest.mark.parametrize("task", [0, 1])
def test_golden(task: int) -> None:
    tokens = Tokens(torch.ones(1, 3, dtype=torch.bool), facts={"task_ids": torch.tensor([task])})
    found = loss_of(CHOICE, recorded(LOGITS_TE, tokens, router_of(Dense())))
    assert round(found.item(), 7) == LOCALIZED[task]
    routing = router_of(Dense())(LOGITS_TE, tokens)
    first_N = torch.tensor([task == 1])
    naive = localized_balance_loss(routing.probs_TE, torch.zeros(3), first_N, tokens.valid_T, 0.1)
    assert round(naive.item(), 7) == LOCALIZED[task]
    plain = LocalizedBalance(coef=1.0, delta=0.0)
    assert exact(loss_of(plain, recorded(LOGITS_TE, tokens, router_of(Dense())))) == 0.028033


@pytest.mark.parametrize("num_experts", [2, 5, 6])
@pytest.mark.parametrize("first_tasks", [[1], [0, 2], []], ids=str)
def test_equals_the_reference(num_experts: int, first_tasks: list[int]) -> None:
    """Value and the router's gradient, over rows of several lengths, one of them of padding only."""
    tokens = batch_of([6, 3, 1, 0, 4], [0, 1, 2, 1, 1])
    router = new_router(Dense(), num_experts=num_experts)
    weight = router.get_parameter("weight")
    torch.nn.init.normal_(weight)
    x_TD = torch.randn(30, 12)
    choice = LocalizedBalance(coef=1.0, delta=0.3, first_tasks=first_tasks)
    record = recorded(x_TD, tokens, router)
    found = loss_of(choice, record)
    first_N = torch.tensor([task in first_tasks for task in [0, 1, 2, 1, 1]])
    expected = localized_balance_loss(record.routing.probs_TE, tokens.sequence_T(), first_N, tokens.valid_T, 0.3)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)
    (grad,), (wanted,) = (torch.autograd.grad(loss, weight, retain_graph=True) for loss in (found, expected))
    torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-7)
    assert wanted.abs().max() > 1e-4


def test_padding_and_packing_change_nothing() -> None:
    router = new_router(Dense(), num_experts=4)
    torch.nn.init.normal_(router.get_parameter("weight"))
    x_TD = torch.randn(9, 12)
    ragged = batch_of([5, 4], [0, 1], width=8)
    padded_TD = torch.randn(16, 12)
    padded_TD[ragged.valid_T] = x_TD
    packed = Tokens(
        torch.ones(1, 9, dtype=torch.bool), torch.tensor([[0] * 5 + [1] * 4]), {"task_ids": torch.tensor([0, 1])}
    )
    found = [loss_of(CHOICE, recorded(x, tokens, router)) for x, tokens in ((padded_TD, ragged), (x_TD, packed))]
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-7)


def test_it_is_zero_where_importance_times_usage_is_even_and_grows_away_from_it() -> None:
    tokens = batch_of([6, 6], [0, 1])
    even_NE = torch.tensor([[1.1, 1.1, 0.9, 0.9], [0.9, 0.9, 1.1, 1.1]])  # inverse to the importance, up to a factor
    record = recorded(torch.randn(12, 12), tokens, new_router(Dense(), num_experts=4))
    for usage_NE, zero in ((even_NE, True), (even_NE.flip(0), False)):
        probs_TE = (usage_NE / 4).repeat_interleave(6, 0)
        routing = type(record.routing)(probs_TE, probs_TE, probs_TE, None, tokens=tokens)
        loss = loss_of(CHOICE, RoutingRecord("layer", "default", routing, tokens.valid_T))
        assert (loss.item() < 1e-6) is zero


def test_of_several_layers_it_is_the_mean() -> None:
    tokens = batch_of([6, 3], [0, 1])
    records = []
    for layer in ("a", "b"):
        router = new_router(Dense(), num_experts=4)
        torch.nn.init.normal_(router.get_parameter("weight"))
        records.append(recorded(torch.randn(12, 12), tokens, router, layer))
    alone = torch.stack([loss_of(CHOICE, record) for record in records])
    torch.testing.assert_close(loss_of(CHOICE, *records), alone.mean())
    assert (alone[0] - alone[1]).abs() > 1e-4


def test_micro_batches_are_balanced_by_themselves() -> None:
    """It is not linear in the tokens: the loss of a step is the mean over its parts, weighted by their tokens."""
    router = new_router(Dense(), num_experts=4)
    torch.nn.init.normal_(router.get_parameter("weight"))
    parts = [recorded(torch.randn(6, 12), batch_of([n], [n % 2]), router) for n in (6, 3)]
    totals = RoutingTotals.of(stack_records(parts))
    shares = torch.stack([balance_losses([part], [CHOICE], totals)[0] for part in parts])
    alone = torch.stack([loss_of(CHOICE, part) for part in parts])
    torch.testing.assert_close(shares, alone * torch.tensor([6 / 9, 3 / 9]))
    assert (alone[0] - alone[1]).abs() > 1e-4


def test_nothing_but_padding_gives_zero() -> None:
    router = new_router(Dense(), num_experts=4)
    loss = loss_of(CHOICE, recorded(torch.randn(12, 12), batch_of([0, 0], [0, 1]), router))
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, router.get_parameter("weight"))
    assert not grad.any()


def test_missing_tasks_are_named() -> None:
    tokens = Tokens(torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ConfigError, match="goes by the task of each sequence.*column `task_ids`.*balance_coef=0"):
        loss_of(CHOICE, recorded(LOGITS_TE, tokens, router_of(Dense())))


def test_what_it_refuses() -> None:
    with pytest.raises(ConfigError, match="selection is 'top_k.*allowed: 'dense'"):
        MoeLoraConfig(balance={"kind": "localized", "coef": 0.1})
    with pytest.raises(ConfigError, match="selection is 'dense.*that are a softmax"):
        MoeLoraConfig(balance="localized", selection="dense", scores={"kind": "linear", "activation": "sigmoid"})
    for words in ({"delta": 1.0}, {"delta": -0.1}, {"first_tasks": [-1]}, {"first_tasks": 1}):
        with pytest.raises(ConfigError, match=r"balance\.(delta|first_tasks) is"):
            LocalizedBalance(coef=0.1, **words)
