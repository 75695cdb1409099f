"""The element-wise part of a feed-forward mixture, one loop over memory for each pass, made by `torch.compile`.

In eager mode some twenty operations each read and write [P, F] numbers; here there is one loop forward, one backward
and one for the sum over a token's choices. They compute in fp32 (or fp64) whatever they read and write.

Shape suffixes: T tokens, F inner features, K chosen experts of a token, P places (the choices sorted by expert).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

from moelora.ops.activation_vjp import ActivationVjp


class _Fused:
    """A function that is compiled at its first call; where that fails, a warning says why and it runs as it is."""

    failure: str | None = None
    """Why compiling does not work on this machine, once it is known."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.compiled: Callable[..., None] | None = None

    def __call__(self, *args: Any) -> None:
        if _Fused.failure is None:
            try:
                if self.compiled is None:
                    self.compiled = torch.compile(self.function, dynamic=True)
                self.compiled(*args)
                return
            except Exception as error:  # whatever a compiler can do wrong; an error of the function itself comes again
                _Fused.failure = f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
                warnings.warn(
                    "compute.implementation is 'compiled' but torch.compile does not work here "
                    f"({_Fused.failure}); going on with the operations of 'fast', which give the same results more "
                    "slowly. On the CPU torch.compile needs a C++ compiler (g++ or clang++).",
                    RuntimeWarning,
                    stacklevel=2,
                )
        self.function(*args)


def compiler_works() -> bool:
    """Whether compiling has not failed so far in this process."""
    return _Fused.failure is None


class FusedKernels:
    """The three loops for one activation.

    Attributes:
        forward: See `_forward`.
        backward: See `_backward`.
        combine: See `_combine`.
    """

    def __init__(self, activation: ActivationVjp) -> None:
        act, act_vjp = activation.forward, activation.vjp
        assert act_vjp is not None

        def forward(*args: Any) -> None:
            _forward(act, *args)

        def backward(*args: Any) -> None:
            _backward(act, act_vjp, *args)

        self.forward, self.backward, self.combine = _Fused(forward), _Fused(backward), _Fused(_combine)


@cache
def fused_kernels(activation: ActivationVjp) -> FusedKernels:
    """The loops for an activation, compiled once a process.

    Args:
        activation: One with a `vjp`.
    """
    return FusedKernels(activation)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _forward(
    act: Callable[[Tensor], Tensor],
    up_TF: Tensor,
    gate_TF: Tensor | None,
    token_P: Tensor,
    added_up_PF: Tensor,
    added_gate_PF: Tensor | None,
    keep_TF: Tensor | None,
    up_PF: Tensor,
    gate_PF: Tensor | None,
    hidden_PF: Tensor,
    kept_PF: Tensor | None,
) -> None:
    """`hidden = act(gate) * up` of each place, from the frozen products of its token and its expert's own parts.

    Args:
        act: Activation.
        up_TF, gate_TF: Outputs of the frozen linears; without gate the block is plain, `act(up)`.
        token_P: Token of each place.
        added_up_PF, added_gate_PF: What the experts add.
        keep_TF: LoRA dropout on the input of down's A, or None.
        up_PF, gate_PF: Output, the sums.
        hidden_PF: Output.
        kept_PF: Output after that dropout, with `keep_TF`.
    """
    up = _wide(up_TF[token_P]) + _wide(added_up_PF)
    up_PF.copy_(up)
    if gate_TF is None or added_gate_PF is None or gate_PF is None:
        hidden = act(up)
    else:
        gate = _wide(gate_TF[token_P]) + _wide(added_gate_PF)
        gate_PF.copy_(gate)
        hidden = act(gate) * up
    hidden_PF.copy_(hidden)
    if keep_TF is not None and kept_PF is not None:
        kept_PF.copy_(hidden * keep_TF[token_P])


def _backward(
    act: Callable[[Tensor], Tensor],
    act_vjp: Callable[[Tensor, Tensor], Tensor],
    up_PF: Tensor,
    gate_PF: Tensor | None,
    token_P: Tensor,
    keep_TF: Tensor | None,
    grad_hidden_TF: Tensor,
    grad_kept_PF: Tensor,
    weights_P: Tensor,
    grad_up_PF: Tensor,
    grad_gate_PF: Tensor | None,
    grad_weights_P: Tensor,
    kept_PF: Tensor,
) -> None:
    """The gradients of `_forward`. No output may be an input as well, or the compiler copies it in a loop of its own.

    Args:
        act, act_vjp: Activation and its vector-Jacobian product.
        up_PF, gate_PF, token_P, keep_TF: As in `_forward`.
        grad_hidden_TF: Gradient of the combined hidden units.
        grad_kept_PF: What comes to each place from down's A.
        weights_P: Weight of each place.
        grad_up_PF, grad_gate_PF: Output, the gradients of the pre-activations.
        grad_weights_P: Output, those of the weights.
        kept_PF: Output, the input of down's A.
    """
    up = _wide(up_PF)
    grad = _wide(grad_kept_PF)
    if keep_TF is not None:
        grad = grad * keep_TF[token_P]
    grad = _wide(grad_hidden_TF[token_P]) + grad
    weighted = grad * weights_P.unsqueeze(1)
    if gate_PF is None or grad_gate_PF is None:
        hidden = act(up)
        grad_up_PF.copy_(act_vjp(weighted, up))
    else:
        gate = _wide(gate_PF)
        active = act(gate)
        hidden = active * up
        grad_up_PF.copy_(weighted * active)
        grad_gate_PF.copy_(act_vjp(weighted * up, gate))
    grad_weights_P.copy_((grad * hidden).sum(-1))
    kept_PF.copy_(hidden if keep_TF is None else hidden * keep_TF[token_P])


def _combine(rows_PF: Tensor, place_TK: Tensor, weights_TK: Tensor | None, sum_TF: Tensor) -> None:
    """The sum of each token's rows, weighted if weights are given, into `sum_TF`."""
    total = torch.zeros_like(sum_TF, dtype=torch.float64 if sum_TF.dtype == torch.float64 else torch.float32)
    for k in range(place_TK.shape[1]):
        rows = _wide(rows_PF[place_TK[:, k]])
        total = total + (rows if weights_TK is None else rows * weights_TK[:, k : k + 1])
    sum_TF.copy_(total)
