"""What a balance is taken over: choices and valid tokens of each mixture of the model, whether it ran or not."""

from __future__ import annotations

import pytest
import torch

from moelora.balance.totals import RoutingTotals
from moelora.errors import ConfigError
from tests.balance.layers import SWITCH, Layers, loss_of, record

DEVICE = torch.device("cpu")


def test_totals_count_the_choices_of_valid_tokens() -> None:
    layers = Layers()
    totals = RoutingTotals.of(layers.records())
    assert list(totals.counts) == [(f"layers.{i}", "default") for i in range(3)]
    for counts_E, tokens, found in zip(totals.counts.values(), totals.tokens_L, layers.records(), strict=True):
        assert found.routing.ids_TK is not None
        chosen = found.routing.ids_TK[layers.valid_T].flatten()
        assert counts_E.tolist() == torch.bincount(chosen, minlength=5).tolist()
        assert int(tokens) == int(layers.valid_T.sum()) == found.valid_tokens
        assert not counts_E.requires_grad


def test_several_records_of_a_mixture_are_added() -> None:
    layers = Layers()
    both = RoutingTotals.of([*layers.records(slice(0, 8)), *layers.records(slice(8, 21))])
    whole = RoutingTotals.of(layers.records())
    assert torch.equal(both.tokens_L, whole.tokens_L)
    for mixture, counts_E in whole.counts.items():
        torch.testing.assert_close(both.counts[mixture], counts_E)


def test_a_mixture_that_did_not_run_has_zeros_and_is_no_layer_of_the_mean() -> None:
    layers = Layers()
    ran = layers.records()[:2]
    mixtures = {record.mixture: record.num_experts for record in layers.records()}
    totals = RoutingTotals.of(ran, mixtures)
    assert list(totals.counts) == list(mixtures)
    assert totals.counts["layers.2", "default"].tolist() == [0] * 5
    assert int(totals.num_ran) == 2
    shares = SWITCH.shares(totals)
    share = torch.stack([shares[r.mixture](r.routing, r.valid_T) for r in ran]).sum()
    torch.testing.assert_close(share, loss_of(SWITCH, *ran))
    without = RoutingTotals.of([], mixtures)
    assert list((without + totals).counts) == list(mixtures)
    assert torch.equal((without + totals).tokens_L, totals.tokens_L)


def test_totals_of_different_layers_do_not_add() -> None:
    records = Layers().records()
    for some in (records[:2], records[::-1]):
        with pytest.raises(ConfigError, match="different layers"):
            RoutingTotals.of(records) + RoutingTotals.of(some)
        with pytest.raises(ConfigError, match="different layers"):
            RoutingTotals.of(some) + RoutingTotals.of(records)


def test_one_process_reduces_to_itself() -> None:
    totals = RoutingTotals.of(Layers().records())
    reduced = totals.all_reduce(DEVICE)
    assert torch.equal(reduced.tokens_L, totals.tokens_L)
    assert reduced.counts.keys() == totals.counts.keys()
    for mixture, counts_E in totals.counts.items():
        assert torch.equal(reduced.counts[mixture], counts_E)


def test_mixtures_of_different_sizes_are_told_apart_after_a_reduction() -> None:
    few, many = Layers(E=3, L=1).records()[0], Layers(E=8, L=1).records()[0]
    totals = RoutingTotals.of([record(few.routing, few.valid_T, "few"), record(many.routing, many.valid_T, "many")])
    reduced = totals.all_reduce(DEVICE)
    assert [len(counts_E) for counts_E in reduced.counts.values()] == [3, 8]
