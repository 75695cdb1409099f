"""What a balance is taken over: choices and valid tokens of each mixture of the model, whether it ran or not."""

from __future__ import annotations

import pytest
import torch

from moelora.balance.losses import balance_losses
from moelora.balance.totals import RoutingTotals
from moelora.errors import ConfigError
from moelora.routing.record import Mixture, RoutingRecord
from moelora.routing.stack import stack_records
from tests.balance.layers import SWITCH, Layers, loss_of, record

DEVICE = torch.device("cpu")


def totals_of(records: list[RoutingRecord], mixtures: dict[Mixture, int] | None = None) -> RoutingTotals:
    return RoutingTotals.of(stack_records(records), mixtures)


def test_totals_count_the_choices_of_valid_tokens() -> None:
    layers = Layers()
    totals = totals_of(layers.records())
    assert list(totals.mixtures) == [(f"layers.{i}", "default") for i in range(3)]
    for counts_E, tokens, found in zip(totals.counts_ME, totals.tokens_M, layers.records(), strict=True):
        assert found.routing.ids_TK is not None
        chosen = found.routing.ids_TK[layers.valid_T].flatten()
        assert counts_E.tolist() == torch.bincount(chosen, minlength=5).tolist()
        assert int(tokens) == int(layers.valid_T.sum()) == found.valid_tokens
        assert not counts_E.requires_grad


def test_several_records_of_a_mixture_are_added() -> None:
    layers = Layers()
    both = totals_of([*layers.records(slice(0, 8)), *layers.records(slice(8, 21))])
    whole = totals_of(layers.records())
    assert torch.equal(both.tokens_M, whole.tokens_M)
    assert torch.equal(both.counts_ME, whole.counts_ME)
    assert both.sums_M2E is not None
    assert whole.sums_M2E is not None
    torch.testing.assert_close(both.sums_M2E, whole.sums_M2E)


def test_a_mixture_that_did_not_run_has_zeros_and_is_no_layer_of_the_mean() -> None:
    layers = Layers()
    ran = layers.records()[:2]
    mixtures = {record.mixture: record.num_experts for record in layers.records()}
    totals = totals_of(ran, mixtures)
    assert totals.mixtures == mixtures
    assert totals.counts_ME[2].tolist() == [0] * 5
    assert int(totals.num_ran) == 2
    (share,) = balance_losses(ran, [SWITCH], totals)
    torch.testing.assert_close(share, loss_of(SWITCH, *ran))
    without = totals_of([], mixtures)
    assert (without + totals).mixtures == mixtures
    assert torch.equal((without + totals).tokens_M, totals.tokens_M)


def test_totals_of_different_layers_do_not_add() -> None:
    records = Layers().records()
    for some in (records[:2], records[::-1]):
        with pytest.raises(ConfigError, match="different layers"):
            totals_of(records) + totals_of(some)
        with pytest.raises(ConfigError, match="different layers"):
            totals_of(some) + totals_of(records)


def test_one_process_reduces_to_itself() -> None:
    totals = totals_of(Layers().records())
    reduced = totals.all_reduce(DEVICE)
    assert torch.equal(reduced.tokens_M, totals.tokens_M)
    assert torch.equal(reduced.counts_ME, totals.counts_ME)


def test_mixtures_of_different_sizes_have_their_own_numbers() -> None:
    few, many = Layers(E=3, L=1).records()[0], Layers(E=8, L=1).records()[0]
    totals = totals_of([record(few.routing, few.valid_T, "few"), record(many.routing, many.valid_T, "many")])
    for found in (few, many):
        name = "few" if found is few else "many"
        own = totals.of_mixtures([(name, "default")], DEVICE)
        assert torch.equal(own.counts_LE, found.counts_E().unsqueeze(0))
        assert own.tokens_L.tolist() == [found.valid_tokens]
