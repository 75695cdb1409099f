"""Activations with their derivative as plain functions, for operations that write their own backward pass."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class ActivationVjp:
    """An element-wise activation and its vector-Jacobian product.

    Attributes:
        forward: `act(x)`, a new tensor.
        backward: Writes `grad * act'(x)` of (grad, x) into its third argument.
        vjp: The same as a new tensor, for code that is compiled; None where only autograd knows it.
        name: What kernels call it that compute it themselves; None where only autograd knows it.
    """

    forward: Activation
    backward: Callable[[Tensor, Tensor, Tensor], Any]
    vjp: Callable[[Tensor, Tensor], Tensor] | None = None
    name: str | None = None


def _autograd_vjp(activation: Activation) -> ActivationVjp:
    def backward(grad: Tensor, x: Tensor, out: Tensor) -> None:
        with torch.enable_grad():
            leaf = x.detach().requires_grad_()
            y = activation(leaf)
        out.copy_(torch.autograd.grad(y, leaf, grad)[0])

    return ActivationVjp(activation, backward)


_aten = torch.ops.aten

_SILU = ActivationVjp(
    nn.functional.silu,
    lambda grad, x, out: _aten.silu_backward.grad_input(grad, x, grad_input=out),
    lambda grad, x: _aten.silu_backward(grad, x),
    "silu",
)
_RELU = ActivationVjp(
    nn.functional.relu,
    lambda grad, x, out: _aten.threshold_backward.grad_input(grad, x, 0, grad_input=out),
    lambda grad, x: _aten.threshold_backward(grad, x, 0),
    "relu",
)


def _gelu(approximate: str) -> ActivationVjp:
    return ActivationVjp(
        lambda x: nn.functional.gelu(x, approximate=approximate),
        lambda grad, x, out: _aten.gelu_backward.grad_input(grad, x, approximate=approximate, grad_input=out),
        lambda grad, x: _aten.gelu_backward(grad, x, approximate=approximate),
        "gelu" if approximate == "none" else "gelu_tanh",
    )


# Made once: a cached function would be seen by torch.compile.
_GELU = {approximate: _gelu(approximate) for approximate in ("none", "tanh")}

_KNOWN: dict[str, ActivationVjp] = {
    "SiLU": _SILU,
    "SiLUActivation": _SILU,
    "ReLU": _RELU,
    "GELUTanh": _GELU["tanh"],
    "PytorchGELUTanh": _GELU["tanh"],
}


def activation_vjp(activation: Any) -> ActivationVjp:
    """The derivative of an activation module: ATen's own for the common ones, autograd's for any other.

    Args:
        activation: An element-wise activation without parameters.
    """
    if isinstance(activation, nn.GELU):
        return _GELU[activation.approximate]
    name = type(activation).__name__
    origin = type(activation).__module__
    if name in _KNOWN and (origin.startswith("torch.nn") or origin == "transformers.activations"):
        return _KNOWN[name]
    return _autograd_vjp(activation)
