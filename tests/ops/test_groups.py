"""Choices grouped by expert: each at its place, whatever the routing.

Shape suffixes: T tokens, K chosen experts of a token, E experts, G groups, S rows of a group.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora.ops.drawn_again import DrawnAgain
from moelora.ops.groups import Groups, group_size


def routings(T: int, E: int, K: int) -> dict[str, Tensor]:
    """Random, the most uneven, and as even as can be."""
    order = torch.arange(T * K).view(T, K)
    return {"random": torch.rand(T, E).topk(K).indices, "one": torch.arange(K).repeat(T, 1), "even": order % E}


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (1, 8, 2), (7, 3, 3), (63, 8, 2), (300, 5, 1)])
@pytest.mark.parametrize("rank", [1, 16])
def test_every_choice_has_a_place_of_its_own(T: int, E: int, K: int, rank: int) -> None:
    for name, ids_TK in routings(T, E, K).items():
        groups = Groups.of(ids_TK, E, rank)
        S = len(groups.token_P) // len(groups.order_G)
        places = groups.place_TK.flatten()
        assert len(places.unique()) == T * K, name
        assert places.max() < len(groups.token_P), name
        assert torch.equal(groups.token_P[groups.place_TK], torch.arange(T).unsqueeze(1).expand(T, K)), name
        assert torch.equal(groups.expert_G[groups.place_TK // S], ids_TK), name
        weights_TK = torch.rand(T, K) + 0.1
        at_place_GS1 = groups.place_values(weights_TK)
        assert torch.equal(at_place_GS1.flatten()[groups.place_TK], weights_TK), name
        assert int((at_place_GS1 == 0).sum()) == len(groups.token_P) - T * K, name


def test_sums_over_tokens_and_over_experts() -> None:
    T, E, K = 63, 8, 2
    ids_TK, weights_TK = torch.rand(T, E - 1).topk(K).indices, torch.rand(T, K)
    groups = Groups.of(ids_TK, E, 3)
    values_TKX = torch.randn(T, K, 5)
    rows_GSX = torch.zeros(*groups.place_values(weights_TK).shape[:2], 5)
    rows_GSX.flatten(0, 1)[groups.place_TK] = values_TKX
    torch.testing.assert_close(groups.combine(rows_GSX), values_TKX.sum(1))
    torch.testing.assert_close(groups.combine(rows_GSX, weights_TK), (values_TKX * weights_TK.unsqueeze(-1)).sum(1))
    sums_EX = groups.sum_by_expert(rows_GSX.sum(1, keepdim=True)).squeeze(1)
    for e in range(E):
        torch.testing.assert_close(sums_EX[e], values_TKX[ids_TK == e].sum(0), atol=1e-5, rtol=1e-5)


def test_the_size_of_a_group() -> None:
    """A power of two near sqrt(3 R N / 8 E): 110 of 3 * 16 * 16384 / 64, and 19 of 3 * 16 * 4096 / 512."""
    assert group_size(16384, 8, 16) == 64
    assert group_size(4096, 64, 16) == 16
    assert group_size(2, 8, 1) == 16
    assert group_size(10**6, 2, 64) == 256


def test_a_mask_is_a_function_of_its_seed() -> None:
    assert DrawnAgain.of(0.0) is None
    dropout, like = DrawnAgain.of(0.25), torch.empty(200, 300, dtype=torch.bfloat16)
    assert dropout is not None
    mask = dropout.mask(like)
    assert mask.dtype == like.dtype
    assert torch.equal(mask, dropout.mask(like))
    assert float(mask.float().mean()) == pytest.approx(0.75, abs=0.01)
    other = DrawnAgain.of(0.25)
    assert other is not None
    assert not torch.equal(mask, other.mask(like))
    torch.manual_seed(7)
    first = DrawnAgain.of(0.25)
    torch.manual_seed(7)
    assert first == DrawnAgain.of(0.25)
