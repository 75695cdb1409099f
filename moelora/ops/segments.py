"""Tokens sorted by expert, in segments of few different lengths.

Shape suffixes: T tokens, K chosen experts of a token, E experts, R rank, F features, P places: the T * K choices sorted
by expert, each expert's segment padded.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

ALIGNMENT = 64
"""Segments are padded to a multiple of this. Matrix products in half precision are compiled for each new shape on CPU;
free lengths would compile hundreds of kernels, multiples need a handful. With few tokens per expert it is a quarter."""


@dataclass(frozen=True)
class Tile:
    """A stretch of places: rows of one expert or of several.

    Attributes:
        start, stop: The places.
        experts: The experts whose rows it holds, in order.
        sizes: How many rows of each.
        starts_expert: Whether those are the expert's first rows; an expert of many tokens continues in the next tile.
    """

    start: int
    stop: int
    experts: tuple[int, ...]
    sizes: tuple[int, ...]
    starts_expert: tuple[bool, ...]


@dataclass(frozen=True)
class Layout:
    """Where the segments lie: everything about them that is not a tensor.

    Attributes:
        num_experts: E.
        num_places: P.
        tiles: The tiles, in order.
        idle: Experts that nobody chose.
    """

    num_experts: int
    num_places: int
    tiles: tuple[Tile, ...]
    idle: tuple[int, ...]

    @property
    def max_rows(self) -> int:
        """Rows of the largest tile."""
        return max((tile.stop - tile.start for tile in self.tiles), default=0)

    @classmethod
    def of(cls, lengths: list[int], max_rows: int) -> Layout:
        """Cut segments of these lengths into tiles of at most `max_rows`; only one that is longer is cut in pieces."""
        tiles: list[Tile] = []
        parts: list[tuple[int, int, bool]] = []
        start = 0

        def close() -> None:
            nonlocal start
            experts, sizes, starts_expert = zip(*parts, strict=True)
            tiles.append(Tile(start, start + sum(sizes), experts, sizes, starts_expert))
            start = tiles[-1].stop
            parts.clear()

        for expert, length in enumerate(lengths):
            for row in range(0, length, max_rows):
                size = min(max_rows, length - row)
                if parts and sum(part[1] for part in parts) + size > max_rows:
                    close()
                parts.append((expert, size, row == 0))
        if parts:
            close()
        idle = tuple(expert for expert, length in enumerate(lengths) if not length)
        return cls(len(lengths), start, tuple(tiles), idle)


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each choice of each token stands after sorting.

    Attributes:
        layout: What is not a tensor.
        token_P: The token at each place (0 at padding).
        row_P: The row of each place in a [T * E, ...] table (0 at padding).
        place_TK: The place of each choice.
    """

    layout: Layout
    token_P: Tensor
    row_P: Tensor
    place_TK: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int, max_rows: int) -> Segments:
        """Sort choices by expert.

        It reads the number of tokens of each expert, which waits for the device where there is one to wait for; it is
        for the CPU, where there is none.

        Args:
            ids_TK: Chosen experts.
            num_experts: E.
            max_rows: Rows of the largest tile.
        """
        T, K = ids_TK.shape
        flat_N = ids_TK.reshape(-1)
        alignment = ALIGNMENT if 2 * ALIGNMENT * num_experts <= T * K else ALIGNMENT // 4
        counts_E = torch.bincount(flat_N, minlength=num_experts)
        lengths = [-(-count // alignment) * alignment for count in counts_E.tolist()]
        layout = Layout.of(lengths, max_rows)
        lengths_E = counts_E.new_tensor(lengths)
        # from an expert's first choice among the sorted to its first place
        shift_E = (lengths_E.cumsum(0) - lengths_E) - (counts_E.cumsum(0) - counts_E)
        order_N = flat_N.argsort(stable=True)
        sorted_N = flat_N[order_N]
        place_of_sorted_N = shift_E[sorted_N] + torch.arange(T * K, device=flat_N.device)
        token_of_sorted_N = order_N // K
        token_P, row_P = flat_N.new_zeros(layout.num_places), flat_N.new_zeros(layout.num_places)
        token_P[place_of_sorted_N] = token_of_sorted_N
        row_P[place_of_sorted_N] = token_of_sorted_N * num_experts + sorted_N
        place_N = torch.empty_like(order_N)
        place_N[order_N] = place_of_sorted_N
        return cls(layout, token_P, row_P, place_N.view(T, K))

    def place_values(self, values_TK: Tensor) -> Tensor:
        """A value for each choice, at its place; 0 at padding: [P]."""
        out_P = values_TK.new_zeros(self.layout.num_places)
        out_P[self.place_TK] = values_TK
        return out_P

    def gather_rows(self, table_TER: Tensor) -> Tensor:
        """The row of each place's token and expert: [P, R]; something arbitrary at padding."""
        return table_TER.flatten(0, 1).index_select(0, self.row_P)

    def scatter_rows(self, rows_PR: Tensor) -> Tensor:
        """A [T, E, R] table with each place's row at its token and expert, 0 where nobody chose."""
        place_N = self.place_TK.flatten()
        table_TER = rows_PR.new_zeros(len(self.place_TK), self.layout.num_experts, rows_PR.shape[1])
        table_TER.flatten(0, 1)[self.row_P[place_N]] = rows_PR.index_select(0, place_N)
        return table_TER

    def combine(self, rows_PF: Tensor, weights_TK: Tensor) -> Tensor:
        """For each token the weighted sum of its choices' rows: [T, F].

        The sum is fp32 inside; the weights of half-precision rows are given as the sum of two such numbers, since one
        would lose so many bits that equal rows under weights of sum one would not give that row again.
        """
        place_TK, dtype = self.place_TK, rows_PF.dtype
        high_TK = weights_TK.to(dtype)
        if dtype.itemsize < weights_TK.dtype.itemsize:
            low_TK = (weights_TK - high_TK).to(dtype)
            high_TK = torch.stack((high_TK, low_TK), -1).flatten(1)
            place_TK = place_TK.repeat_interleave(2, dim=1)
        return F.embedding_bag(place_TK, rows_PF, mode="sum", per_sample_weights=high_TK)
