"""Products with each expert's factor on the rows of a tile, and the memory they go to.

Shape suffixes: N rows of a tile, I and O features of a product, P places.
"""

from __future__ import annotations

import torch

from moelora.ops.segment_kernels import LowRank, TileMemory, accumulate, multiply
from moelora.ops.segments import Tile

TILES = (Tile(0, 6, (0, 2), (2, 4), (True, True)), Tile(6, 9, (2,), (3,), (False,)))
EXPERT_P = torch.tensor([0, 0, 2, 2, 2, 2, 2, 2, 2])


def test_products_take_the_factor_of_each_rows_expert() -> None:
    rows_PI, weights_EIO = torch.randn(9, 3), torch.randn(3, 3, 5)
    out_PO = torch.empty(9, 5)
    for tile in TILES:
        rows = slice(tile.start, tile.stop)
        multiply(tile, rows_PI[rows], weights_EIO.unbind(), out_PO[rows])
    expected_PO = torch.stack([row @ weights_EIO[e] for row, e in zip(rows_PI, EXPERT_P, strict=True)])
    torch.testing.assert_close(out_PO, expected_PO)


def test_shares_of_an_experts_tiles_add_up() -> None:
    left_PI, right_PO = torch.randn(9, 3), torch.randn(9, 5)
    totals_EIO = torch.full((3, 3, 5), torch.nan)
    for tile in TILES:
        rows = slice(tile.start, tile.stop)
        accumulate(tile, left_PI[rows], right_PO[rows], totals_EIO.unbind())
    for expert in (0, 2):
        of_expert = EXPERT_P.eq(expert)
        torch.testing.assert_close(totals_EIO[expert], left_PI[of_expert].t() @ right_PO[of_expert])
    assert totals_EIO[1].isnan().all()


def test_low_rank_rows_are_added_in_the_dtype_of_the_rows() -> None:
    inner_PR, weights_ERF = torch.randn(9, 3), torch.randn(3, 3, 5)
    low_rank = LowRank(inner_PR, weights_ERF.unbind(), TileMemory(torch.empty(0), 6, 5))
    expected_PF = torch.stack([row @ weights_ERF[e] for row, e in zip(inner_PR, EXPERT_P, strict=True)])
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 1e-2)):
        rows_PF = torch.ones(9, 5, dtype=dtype)
        for tile in TILES:
            low_rank.add_to(rows_PF[tile.start : tile.stop], tile)
        torch.testing.assert_close(rows_PF.float(), 1 + expected_PF, rtol=tolerance, atol=tolerance)


def test_memory_is_taken_once_for_each_name_and_dtype() -> None:
    memory = TileMemory(torch.empty(0), 6, 5)
    first, again = memory.rows("a", 6, torch.float32), memory.rows("a", 4, torch.float32)
    assert again.shape == (4, 5)
    assert first.data_ptr() == again.data_ptr()
    others = (memory.rows("b", 6, torch.float32), memory.rows("a", 6, torch.bfloat16))
    assert len({first.data_ptr(), *(other.data_ptr() for other in others)}) == 3
    assert TileMemory(torch.empty(0), 6, 5).rows("a", 6, torch.float32).data_ptr() != first.data_ptr()
