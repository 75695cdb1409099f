"""Sorting choices by expert: every choice has a place of its own, and what is placed comes back.

Shape suffixes: T tokens, K chosen experts of a token, E experts, R rank, F features, P places.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora.ops.segments import Layout, Segments, Tile

SIZES = [(0, 3, 2), (1, 8, 2), (7, 3, 1), (63, 8, 2), (700, 3, 2), (40, 64, 5)]


def choices(T: int, E: int, K: int) -> Tensor:
    return torch.rand(T, E).topk(K).indices


def test_a_layout_cuts_only_segments_longer_than_a_tile() -> None:
    layout = Layout.of([4, 4, 0, 20, 2], max_rows=8)
    assert layout.tiles == (
        Tile(0, 8, (0, 1), (4, 4), (True, True)),
        Tile(8, 16, (3,), (8,), (True,)),
        Tile(16, 24, (3,), (8,), (False,)),
        Tile(24, 30, (3, 4), (4, 2), (False, True)),
    )
    assert (layout.num_experts, layout.num_places, layout.max_rows, layout.idle) == (5, 30, 8, (2,))


@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_places(T: int, E: int, K: int) -> None:
    ids_TK = choices(T, E, K)
    segments = Segments.of(ids_TK, E, 256)
    assert segments.place_TK.unique().numel() == T * K
    experts = [expert for tile in segments.layout.tiles for expert in tile.experts]
    sizes = [size for tile in segments.layout.tiles for size in tile.sizes]
    expert_P = torch.tensor(experts, dtype=torch.long).repeat_interleave(torch.tensor(sizes, dtype=torch.long))
    assert len(expert_P) == segments.layout.num_places
    assert torch.equal(expert_P[segments.place_TK], ids_TK)
    token_TK = torch.arange(T)[:, None].expand(T, K)
    assert torch.equal(segments.token_P[segments.place_TK], token_TK)
    assert torch.equal(segments.row_P[segments.place_TK], token_TK * E + ids_TK)


@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_rows_are_gathered_and_scattered_by_token_and_expert(T: int, E: int, K: int) -> None:
    ids_TK, table_TER = choices(T, E, K), torch.randn(T, E, 3)
    segments = Segments.of(ids_TK, E, 256)
    chosen_TE = torch.zeros(T, E).scatter(1, ids_TK, 1.0)
    scattered_TER = segments.scatter_rows(segments.gather_rows(table_TER))
    assert torch.equal(scattered_TER, table_TER * chosen_TE.unsqueeze(-1))


@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_values_are_placed_with_zeros_at_padding(T: int, E: int, K: int) -> None:
    ids_TK, values_TK = choices(T, E, K), torch.rand(T, K) + 1
    segments = Segments.of(ids_TK, E, 256)
    values_P = segments.place_values(values_TK)
    assert torch.equal(values_P[segments.place_TK], values_TK)
    assert int((values_P != 0).sum()) == T * K


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("T", "E", "K"), SIZES)
def test_combine(T: int, E: int, K: int, dtype: torch.dtype) -> None:
    segments, weights_TK = Segments.of(choices(T, E, K), E, 256), torch.rand(T, K)
    rows_PF = torch.randn(segments.layout.num_places, 5).to(dtype)
    expected_TF = (rows_PF.float()[segments.place_TK] * weights_TK.unsqueeze(-1)).sum(1)
    actual_TF = segments.combine(rows_PF, weights_TK)
    assert actual_TF.dtype == dtype
    # one rounding of the sum, none of the weights
    atol = 1e-6 if dtype == torch.float32 else torch.finfo(dtype).eps / 100
    torch.testing.assert_close(actual_TF.float(), expected_TF, rtol=torch.finfo(dtype).eps, atol=atol)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_equal_rows_under_weights_of_sum_one_are_that_row(dtype: torch.dtype) -> None:
    segments = Segments.of(choices(63, 8, 5), 8, 256)
    row_F = torch.randn(1000).to(dtype)
    weights_TK = torch.rand(63, 5).softmax(-1)
    combined_TF = segments.combine(row_F.expand(segments.layout.num_places, -1).contiguous(), weights_TK)
    assert torch.equal(combined_TF, row_F.expand(63, -1))
