"""Whether Triton's kernels give here what they should: they need a compiler of C, and were never run on a GPU.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, M = E * R.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from moelora.autocast import no_autocast

_WORKS = {"meta": True}
"""Whether they work, by type of device, once it is known; meta tensors have shapes alone."""

_TOLERANCE = 1e-2
"""Relative, in fp16: a wrong index or a lost block is an error of order one."""


@torch.compiler.assume_constant_result
def kernels_work(device: str) -> bool:
    """Compare all kernels with plain products on a small case, once in a process; where one fails, a warning says why.

    Args:
        device: Type of device.
    """
    if device not in _WORKS:
        try:
            failure = _difference(device)
        except Exception as error:  # whatever a compiler, a driver or a launch can do wrong
            failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        _WORKS[device] = failure is None
        if failure is not None:
            warnings.warn(
                f"Triton's kernels do not work on {device!r} ({failure}); continuing without them: the same results in "
                "more launches. Triton needs a C compiler (gcc or clang); MOELORA_TRITON=0 skips this check.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _WORKS[device]


@torch.no_grad()
def _difference(device: str) -> str | None:
    """Which result differs, on sizes that fill no block; no generator is touched, and nothing is kept for autograd."""
    T, D, O, E, R, scale = 37, 70, 45, 3, 5, 2.0

    def values(*shape: int) -> Tensor:
        """Numbers that look random, different for each shape."""
        number = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
        return torch.sin(number * number + sum(shape)).view(shape).half()

    x, a, b, base, grad = values(T, D), values(E, R, D), values(E, O, R), values(T, O), values(T, O) / 2
    gates = values(T, E).float()
    seed = torch.zeros(1, dtype=torch.long, device=device)  # at p = 0 numbers are drawn and nothing is dropped
    ops = torch.ops.moelora
    y, inner = ops.mixture_linear(x, a, b, gates, base, seed, scale, 0.0)
    grad_inner, grad_x, grad_gates = ops.mixture_linear_token_grads(
        grad, a, b, gates, inner, seed, scale, 0.0, True, True
    )
    sums = ops.mixture_linear_factor_grads(grad, x, gates, inner, grad_inner, seed, E, scale, 0.0)
    grad_a, grad_b = sums.float().sum(0).split([a.numel(), b.numel()])
    with no_autocast(x.device):
        x, a_MD, b_MO, grad = x.float(), a.float().flatten(0, 1), b.float().mT.flatten(0, 1), grad.float()
        gate_TM = gates.repeat_interleave(R, 1)
        inner_TM = x @ a_MD.t()
        grad_TM = scale * grad @ b_MO.t()
        expected = {
            "output": (y, base + scale * (inner_TM * gate_TM) @ b_MO),
            "gradient of the tokens": (grad_x, (grad_TM * gate_TM) @ a_MD),
            "gradient of the gates": (grad_gates, (grad_TM * inner_TM).view(T, E, R).sum(-1)),
            "gradient of A": (grad_a.view(E * R, D), (grad_TM * gate_TM).t() @ x),
            "gradient of B": (grad_b.view(E, O, R).mT.flatten(0, 1), scale * (inner_TM * gate_TM).t() @ grad),
        }
        for name, (found, right) in expected.items():
            error = float((found.float() - right).norm() / right.norm())
            if not error < _TOLERANCE:
                return f"the {name} is off by {error:.1e}"
    return None
