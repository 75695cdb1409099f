"""Tokens sorted by expert, in segments of few different lengths.

Shape suffixes: T tokens, K chosen experts of a token, E experts, P places: the T * K choices sorted by expert, each
expert's segment padded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 64
"""Segments are padded to a multiple of this. Matrix products in half precision are compiled for each new shape on CPU;
free lengths would compile hundreds of kernels, multiples need a handful. With few tokens an expert it is a quarter."""

MAX_ROWS = 512
"""Segments are worked on in tiles of at most so many rows, so that a tile stays in the processor's cache."""


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each choice of each token stands after sorting.

    Attributes:
        token_P: The token at each place (0 at padding).
        row_P: The row of each place in a [T * E, ...] table (0 at padding).
        row_N: The row of each choice in such a table, choice by choice; no two are the same.
        place_N: The place of each choice.
        place_TK: The same by token.
        tiles: (expert, start, stop) of each tile, in order.
        experts: The expert of each tile.
        idle: Experts that nobody chose.
    """

    token_P: Tensor
    row_P: Tensor
    row_N: Tensor
    place_N: Tensor
    place_TK: Tensor
    tiles: tuple[tuple[int, int, int], ...]
    experts: tuple[int, ...]
    idle: tuple[int, ...]

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int) -> Segments:
        """Sort choices by expert.

        It reads the number of tokens of each expert, which waits for the device where there is one to wait for; it is
        for the CPU, where there is none.

        Args:
            ids_TK: Chosen experts.
            num_experts: E.
        """
        T, K = ids_TK.shape
        flat_N = ids_TK.reshape(-1)
        alignment = ALIGNMENT if 2 * ALIGNMENT * num_experts <= T * K else ALIGNMENT // 4
        counts_E = torch.bincount(flat_N, minlength=num_experts)
        counts = counts_E.tolist()
        starts, tiles, start = [], [], 0
        for expert, count in enumerate(counts):
            starts.append(start)
            stop = start + -(-count // alignment) * alignment
            tiles += [(expert, row, min(row + MAX_ROWS, stop)) for row in range(start, stop, MAX_ROWS)]
            start = stop
        order_N = flat_N.argsort(stable=True)
        sorted_N = flat_N[order_N]
        first_E = counts_E.cumsum(0) - counts_E
        place_of_sorted_N = torch.tensor(starts)[sorted_N] + torch.arange(T * K) - first_E[sorted_N]
        row_N = torch.arange(T).repeat_interleave(K) * num_experts + flat_N
        token_P, row_P = torch.zeros(start, dtype=torch.long), torch.zeros(start, dtype=torch.long)
        token_P[place_of_sorted_N] = order_N // K
        row_P[place_of_sorted_N] = row_N[order_N]
        place_N = torch.empty_like(order_N)
        place_N[order_N] = place_of_sorted_N
        idle = tuple(expert for expert, count in enumerate(counts) if not count)
        experts = tuple(expert for expert, _, _ in tiles)
        return cls(token_P, row_P, row_N, place_N, place_N.view(T, K), tuple(tiles), experts, idle)

    def accumulate(self, totals: Sequence[Tensor], i: int, left_NI: Tensor, right_NO: Tensor) -> None:
        """Add the share of tile i, `left^T right`, to its expert's total; the expert's first tile overwrites it.

        Args:
            totals: [I, O] of each expert.
            i: Index of the tile; all tiles must come in order.
            left_NI, right_NO: Rows of the tile.
        """
        expert = self.experts[i]
        if i > 0 and self.experts[i - 1] == expert:
            totals[expert].addmm_(left_NI.t(), right_NO)
        else:
            torch.mm(left_NI.t(), right_NO, out=totals[expert])

    def split(self, rows_P: Tensor) -> tuple[Tensor, ...]:
        """Views of the tiles."""
        return rows_P.split([stop - start for _, start, stop in self.tiles])

    def spread(self, values_TK: Tensor) -> Tensor:
        """A value for each choice, at its place; 0 at padding: [P]."""
        out_P = values_TK.new_zeros(len(self.token_P))
        out_P[self.place_N] = values_TK.reshape(-1)
        return out_P

    def take(self, table_TER: Tensor) -> Tensor:
        """The row of each place's token and expert: [P, R]; something arbitrary at padding."""
        return table_TER.flatten(0, 1).index_select(0, self.row_P)

    def combine(self, rows_PF: Tensor, weights_TK: Tensor) -> Tensor:
        """For each token the weighted sum of its choices' rows: [T, F]."""
        weights_TK = weights_TK.to(rows_PF.dtype)
        return F.embedding_bag(self.place_TK, rows_PF, mode="sum", per_sample_weights=weights_TK)

    def put(self, rows_PR: Tensor, table_shape: torch.Size) -> Tensor:
        """A [T, E, R] table with each place's row at its token and expert, 0 where nobody chose."""
        table_TER = rows_PR.new_zeros(table_shape)
        table_TER.flatten(0, 1)[self.row_N] = rows_PR.index_select(0, self.place_N)
        return table_TER
