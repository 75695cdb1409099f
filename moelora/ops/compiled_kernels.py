"""The element-wise part of a feed-forward mixture, one loop over a tile for each pass, made by `torch.compile`.

In eager mode some twenty operations each read and write a tile; here there is one loop forward, one backward and one
for the sum over a token's choices. They compute in fp32 (or fp64) whatever they read and write, so that in half
precision `act(gate) * up` is rounded once, where the block itself rounds the activation as well: with B = 0 the output
may differ from the block's by that rounding.

Shape suffixes: T tokens, F inner features, K chosen experts of a token, P places (the choices sorted by expert), N rows
of a tile.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.ops.activation_vjp import ActivationVjp
from moelora.ops.segment_kernels import FrozenProduct, LowRank, TileMemory
from moelora.ops.segments import Segments, Tile


class _Compiled:
    """A function that is compiled at its first call; where that fails, a warning says why and it runs as it is."""

    failure: str | None = None
    """Why compiling does not work on this machine, once it is known."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if _Compiled.failure is None:
            try:
                if self.compiled is None:
                    self.compiled = torch.compile(self.function, dynamic=True)
                self.compiled(*args)
                return
            except Exception as error:  # whatever a compiler can do wrong; an error of the function itself comes again
                _Compiled.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                warnings.warn(
                    "compute is 'compiled' but torch.compile does not work here "
                    f"({_Compiled.failure}); continuing with the operations of 'fast', which give the same results "
                    "more slowly. On the CPU torch.compile needs a C++ compiler (g++ or clang++).",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.function(*args)


def compiler_works() -> bool:
    """Whether compiling has not failed so far in this process."""
    return _Compiled.failure is None


class _Loops(NamedTuple):
    """The compiled loops of one activation: `_forward`, `_backward` and `_combine`."""

    forward: _Compiled
    backward: _Compiled
    combine: _Compiled


@cache
def _loops(activation: ActivationVjp) -> _Loops:
    """Compiled once per process; code, no data of any call."""
    act, act_vjp = activation.forward, activation.vjp
    assert act_vjp is not None

    def forward(*args: Any) -> None:
        _forward(act, *args)

    def backward(*args: Any) -> None:
        _backward(act, act_vjp, *args)

    return _Loops(_Compiled(forward), _Compiled(backward), _Compiled(_combine))


class CompiledKernels:
    """`SegmentKernels` as compiled loops.

    Args:
        activation: The block's activation, one with a `vjp`.
        memory: Memory of this call.
    """

    max_rows = 512

    def __init__(self, activation: ActivationVjp, memory: TileMemory) -> None:
        self.loops, self.memory = _loops(activation), memory

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
        added_up_NF = None if up.added is None else up.added.product(tile, "up")
        added_gate_NF = None if gate is None or gate.added is None else gate.added.product(tile, "gate")
        self.loops.forward(
            up.base_TF,
            None if gate is None else gate.base_TF,
            token_N,
            added_up_NF,
            added_gate_NF,
            keep_TF,
            out_up_NF,
            out_gate_NF,
            out_hidden_NF,
            out_kept_NF,
        )

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
        grad_kept_NF = None if down is None else down.product(tile, "down")
        self.loops.backward(
            up_NF,
            gate_NF,
            token_N,
            keep_TF,
            grad_hidden_TF,
            grad_kept_NF,
            *out_up,
            *(out_gate or (None, None)),
            out_weights_N,
            out_kept_NF,
        )

    def combine(self, segments: Segments, rows_PF: Tensor, weights_TK: Tensor) -> Tensor:
        """See `SegmentKernels`."""
        sum_TF = rows_PF.new_empty(len(weights_TK), rows_PF.shape[1])
        self.loops.combine(rows_PF, segments.place_TK, weights_TK, sum_TF)
        return sum_TF


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward(
    act: Callable[[Tensor], Tensor],
    up_TF: Tensor,
    gate_TF: Tensor | None,
    token_N: Tensor,
    added_up_NF: Tensor | None,
    added_gate_NF: Tensor | None,
    keep_TF: Tensor | None,
    out_up_NF: Tensor,
    out_gate_NF: Tensor | None,
    out_hidden_NF: Tensor | None,
    out_kept_NF: Tensor | None,
) -> None:
    """`SegmentKernels.forward` behind the products, which come as `added`."""
    up = _pre_activation(up_TF, token_N, added_up_NF)
    out_up_NF.copy_(up)
    if gate_TF is None or out_gate_NF is None:
        hidden = act(up)
    else:
        gate = _pre_activation(gate_TF, token_N, added_gate_NF)
        out_gate_NF.copy_(gate)
        hidden = act(gate) * up
    if out_hidden_NF is not None:
        out_hidden_NF.copy_(hidden)
    if out_kept_NF is not None:
        out_kept_NF.copy_(hidden if keep_TF is None else hidden * keep_TF[token_N])


def _pre_activation(base_TF: Tensor, token_N: Tensor, added_NF: Tensor | None) -> Tensor:
    base_NF = _wide(base_TF[token_N])
    return base_NF if added_NF is None else base_NF + _wide(added_NF)


def _backward(
    act: Callable[[Tensor], Tensor],
    act_vjp: Callable[[Tensor, Tensor], Tensor],
    up_NF: Tensor,
    gate_NF: Tensor | None,
    token_N: Tensor,
    keep_TF: Tensor | None,
    grad_hidden_TF: Tensor,
    grad_kept_NF: Tensor | None,
    out_up_NF: Tensor,
    out_wide_up_NF: Tensor | None,
    out_gate_NF: Tensor | None,
    out_wide_gate_NF: Tensor | None,
    out_weights_N: Tensor,
    out_kept_NF: Tensor | None,
) -> None:
    """`SegmentKernels.backward` behind the product with down's A, which comes as `grad_kept`.

    No output may be an input as well, or the compiler copies it in a loop of its own.
    """
    up = _wide(up_NF)
    grad = _wide(grad_hidden_TF[token_N])
    if grad_kept_NF is not None:
        grad = grad + (_wide(grad_kept_NF) if keep_TF is None else _wide(grad_kept_NF) * keep_TF[token_N])
    if gate_NF is None or out_gate_NF is None:
        hidden = act(up)
        grad_up = act_vjp(grad, up)
    else:
        gate = _wide(gate_NF)
        active = act(gate)
        hidden = active * up
        grad_up = grad * active
        grad_gate = act_vjp(grad * up, gate)
        out_gate_NF.copy_(grad_gate)
        if out_wide_gate_NF is not None:
            out_wide_gate_NF.copy_(grad_gate)
    out_up_NF.copy_(grad_up)
    if out_wide_up_NF is not None:
        out_wide_up_NF.copy_(grad_up)
    out_weights_N.copy_((grad * hidden).sum(-1))
    if out_kept_NF is not None:
        out_kept_NF.copy_(hidden if keep_TF is None else hidden * keep_TF[token_N])


def _combine(rows_PF: Tensor, place_TK: Tensor, weights_TK: Tensor, sum_TF: Tensor) -> None:
    """The weighted sum of each token's rows, into `sum_TF`."""
    total = torch.zeros_like(sum_TF, dtype=torch.float64 if sum_TF.dtype == torch.float64 else torch.float32)
    for k in range(place_TK.shape[1]):
        total = total + _wide(rows_PF[place_TK[:, k]]) * weights_TK[:, k : k + 1]
    sum_TF.copy_(total)
