"""The work on one tile of sorted choices: matrix products with each expert's factors, and the element-wise part.

Shape suffixes: T tokens, F inner features, R rank of one expert, I and O features of a product, K chosen experts of a
token, N rows of a tile, P places.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from moelora.ops.activation_vjp import ActivationVjp
from moelora.ops.segments import Segments, Tile


def multiply(tile: Tile, rows_NI: Tensor, weights_IO: Sequence[Tensor], out_NO: Tensor) -> Tensor:
    """`out = rows @ weight` with each row's expert's weight."""
    parts = zip(tile.experts, rows_NI.split(tile.sizes), out_NO.split(tile.sizes), strict=True)
    for expert, rows, out in parts:
        torch.mm(rows, weights_IO[expert], out=out)
    return out_NO


def accumulate(tile: Tile, left_NI: Tensor, right_NO: Tensor, totals_IO: Sequence[Tensor]) -> None:
    """Add `left^T right` of each expert's rows to its total, which its first rows overwrite; tiles come in order."""
    parts = zip(tile.experts, tile.starts_expert, left_NI.split(tile.sizes), right_NO.split(tile.sizes), strict=True)
    for expert, starts, left, right in parts:
        if starts:
            torch.mm(left.t(), right, out=totals_IO[expert])
        else:
            totals_IO[expert].addmm_(left.t(), right)


class TileMemory:
    """Memory for one tile, taken anew in each call and used again by each of its tiles.

    A fresh tensor of a few megabytes on the CPU costs more in page faults than most element-wise operations on it; but
    memory that outlives the call is state, which inference mode, threads and other models would share.

    Args:
        like_TF: A tensor on the device.
        num_rows: Rows of the largest tile.
        num_features: F.
    """

    def __init__(self, like_TF: Tensor, num_rows: int, num_features: int) -> None:
        self.like, self.size = like_TF, (num_rows, num_features)
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def rows(self, name: str, num_rows: int, dtype: torch.dtype) -> Tensor:
        """Uninitialised [N, F]; valid until the next call with that name and dtype."""
        if (name, dtype) not in self.memory:
            self.memory[name, dtype] = self.like.new_empty(self.size, dtype=dtype)
        return self.memory[name, dtype][:num_rows]

    def cast(self, name: str, rows_NF: Tensor, dtype: torch.dtype) -> Tensor:
        """The rows in another dtype; themselves if they have it."""
        return rows_NF if rows_NF.dtype == dtype else self.rows(name, len(rows_NF), dtype).copy_(rows_NF)


class LowRank:
    """A product with each expert's factor, a tile at a time: what LoRA adds to the rows of a tile.

    Args:
        inner_PR: Scaled inner activations at each place.
        weights_RF: The factor of each expert.
        memory: Where products go.
    """

    def __init__(self, inner_PR: Tensor, weights_RF: Sequence[Tensor], memory: TileMemory) -> None:
        self.inner_PR, self.weights_RF, self.memory = inner_PR, weights_RF, memory
        self.dtype = inner_PR.dtype

    def product(self, tile: Tile, name: str) -> Tensor:
        """The rows of a tile, in the dtype of the experts; valid until the next call with that name."""
        out_NF = self.memory.rows(name, tile.stop - tile.start, self.dtype)
        return multiply(tile, self.inner_PR[tile.start : tile.stop], self.weights_RF, out_NF)

    def add_to(self, rows_NF: Tensor, tile: Tile) -> None:
        """`rows += product`, in place; experts may be of higher precision than the block."""
        if rows_NF.dtype != self.dtype:
            rows_NF.add_(self.product(tile, "added"))
            return
        inner = self.inner_PR[tile.start : tile.stop].split(tile.sizes)
        for expert, inner_NR, part_NF in zip(tile.experts, inner, rows_NF.split(tile.sizes), strict=True):
            part_NF.addmm_(inner_NR, self.weights_RF[expert])


class FrozenProduct(NamedTuple):
    """Output [T, F] of a frozen linear for all tokens, and what the experts add to it (None: nothing)."""

    base_TF: Tensor
    added: LowRank | None


class SegmentKernels(Protocol):
    """The element-wise work of a mixture; all tensors called `out` are written, where they are not None.

    Attributes:
        max_rows: Rows of the largest tile. A tile is to stay in the processor's cache, and has a fixed cost per call.
    """

    max_rows: int

    def forward(
        self,
        tile: Tile,
        token_N: Tensor,
        up: FrozenProduct,
        gate: FrozenProduct | None,
        keep_TF: Tensor | None,
        out_up_NF: Tensor,
        out_gate_NF: Tensor | None,
        out_hidden_NF: Tensor | None,
        out_kept_NF: Tensor | None,
    ) -> None:
        """Pre-activations of a tile, and `hidden = act(gate) * up` (or `act(up)`) from them.

        Args:
            tile: The tile.
            token_N: The token of each row.
            up, gate: The frozen products; without gate the block is plain.
            keep_TF: What is left after LoRA dropout on the input of down's A, scaled.
            out_up_NF, out_gate_NF: The pre-activations.
            out_hidden_NF: The hidden units.
            out_kept_NF: The hidden units after that dropout, in the dtype of the experts.
        """

    def backward(
        self,
        tile: Tile,
        token_N: Tensor,
        up_NF: Tensor,
        gate_NF: Tensor | None,
        keep_TF: Tensor | None,
        grad_hidden_TF: Tensor,
        down: LowRank | None,
        out_up: tuple[Tensor, Tensor | None],
        out_gate: tuple[Tensor, Tensor | None] | None,
        out_weights_N: Tensor,
        out_kept_NF: Tensor | None,
    ) -> None:
        """The gradients of `forward` and of the weighted sum behind it.

        A row's weight is not applied to the gradients of the pre-activations: it rides on the small side of each
        product and on the sum over a token's choices.

        Args:
            tile, token_N, keep_TF: As in `forward`.
            up_NF, gate_NF: The pre-activations.
            grad_hidden_TF: Gradient of the weighted sum of the hidden units.
            down: What comes back through down's A.
            out_up, out_gate: The gradients of the pre-activations, in the dtype of the block and in that of the experts
                (None where that is the same, or where there are no experts).
            out_weights_N: The gradient of each row's weight.
            out_kept_NF: As in `forward`.
        """

    def combine(self, segments: Segments, rows_PF: Tensor, weights_TK: Tensor) -> Tensor:
        """For each token the weighted sum of its choices' rows: [T, F]."""


class EagerKernels:
    """`SegmentKernels` by PyTorch's own operations, in place where they can be.

    Args:
        activation: The block's activation.
        memory: Memory of this call.
    """

    max_rows = 256

    def __init__(self, activation: ActivationVjp, memory: TileMemory) -> None:
        self.activation, self.memory = activation, memory

    def forward(
        self,
        tile: Tile,
        token_N: Tensor,
        up: FrozenProduct,
        gate: FrozenProduct | None,
        keep_TF: Tensor | None,
        out_up_NF: Tensor,
        out_gate_NF: Tensor | None,
        out_hidden_NF: Tensor | None,
        out_kept_NF: Tensor | None,
    ) -> None:
        """See `SegmentKernels`."""
        for product, out in ((up, out_up_NF), (gate, out_gate_NF)):
            if product is not None and out is not None:
                torch.index_select(product.base_TF, 0, token_N, out=out)
                if product.added is not None:
                    product.added.add_to(out, tile)
        if out_hidden_NF is None:
            return
        if out_gate_NF is None:
            out_hidden_NF.copy_(self.activation.forward(out_up_NF))
        else:
            torch.mul(self.activation.forward(out_gate_NF), out_up_NF, out=out_hidden_NF)
        if out_kept_NF is not None:
            out_kept_NF.copy_(self._kept(out_hidden_NF, keep_TF, token_N))

    def backward(
        self,
        tile: Tile,
        token_N: Tensor,
        up_NF: Tensor,
        gate_NF: Tensor | None,
        keep_TF: Tensor | None,
        grad_hidden_TF: Tensor,
        down: LowRank | None,
        out_up: tuple[Tensor, Tensor | None],
        out_gate: tuple[Tensor, Tensor | None] | None,
        out_weights_N: Tensor,
        out_kept_NF: Tensor | None,
    ) -> None:
        """See `SegmentKernels`."""
        act_NF = self.activation.forward(up_NF if gate_NF is None else gate_NF)
        hidden_NF = act_NF if gate_NF is None else act_NF * up_NF
        grad_NF = self.memory.rows("grad", len(token_N), up_NF.dtype)
        torch.index_select(grad_hidden_TF, 0, token_N, out=grad_NF)
        if out_kept_NF is not None:
            out_kept_NF.copy_(self._kept(hidden_NF, keep_TF, token_N))
        if down is not None and keep_TF is None:
            down.add_to(grad_NF, tile)
        elif down is not None:
            grad_NF.add_(self._kept(down.product(tile, "added"), keep_TF, token_N))
        torch.sum(grad_NF * hidden_NF, -1, dtype=out_weights_N.dtype, out=out_weights_N)
        if gate_NF is None or out_gate is None:
            self.activation.backward(grad_NF, up_NF, out_up[0])
        else:
            torch.mul(grad_NF, act_NF, out=out_up[0])
            self.activation.backward(grad_NF.mul_(up_NF), gate_NF, out_gate[0])
        for pair in (out_up, out_gate):
            if pair is not None and pair[1] is not None:
                pair[1].copy_(pair[0])

    def combine(self, segments: Segments, rows_PF: Tensor, weights_TK: Tensor) -> Tensor:
        """See `SegmentKernels`."""
        return segments.combine(rows_PF, weights_TK)

    def _kept(self, rows_NF: Tensor, keep_TF: Tensor | None, token_N: Tensor) -> Tensor:
        return rows_NF if keep_TF is None else rows_NF * keep_TF.index_select(0, token_N).to(rows_NF.dtype)
