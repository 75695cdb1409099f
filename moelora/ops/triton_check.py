"""Whether Triton's kernels give here what they should: they need a compiler of C, and were never run on a GPU.

Shape suffixes: T tokens, D input features, O output features, F inner features of a block, E experts, R rank of one
expert, K choices of a token, M = E * R.
"""

from __future__ import annotations

import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Kind = Literal["linear", "feed_forward"]

_WORKS: dict[tuple[Kind, str, torch.dtype], bool] = {}
"""Whether they work, by what they compute, type of device and dtype of the experts, once it is known."""

_TOLERANCE = 3e-2
"""Relative, also in bf16: a wrong index or a lost block is an error of order one."""

_Results = dict[str, tuple[Tensor, Tensor]]
"""What the kernels gave and what is right, by name."""


@torch.compiler.assume_constant_result
def kernels_work(kind: Kind, ranks: int, device: str, dtype: torch.dtype) -> bool:
    """Compare kernels with plain products on a small case; where one fails, a warning says why.

    Once in a process for each dtype. It runs in a thread of its own: the first call may be made in inference mode,
    under autocast or inside a checkpointed layer, all of which hold for one thread.

    Args:
        kind: What they compute.
        ranks: E * R of the case, a multiple of 16.
        device: Type of device; "meta" has shapes alone.
        dtype: Of the experts.
    """
    if device == "meta":
        return True
    if (kind, device, dtype) not in _WORKS:
        place = torch.device("cuda", torch.cuda.current_device()) if device == "cuda" else torch.device(device)
        try:
            with ThreadPoolExecutor(1) as thread:
                failure = thread.submit(_difference, kind, ranks, place, dtype).result()
        except Exception as error:  # whatever a compiler, a driver or a launch can do wrong
            failure = f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"
        _WORKS[kind, device, dtype] = failure is None
        if failure is not None:
            warnings.warn(
                f"Triton's {kind} kernels do not work on {device!r} in {dtype} ({failure}); continuing without them: "
                "the same results in more launches. Triton needs a C compiler (gcc or clang); MOELORA_TRITON=0 skips "
                "this check.",
                RuntimeWarning,
                stacklevel=2,
            )
    return _WORKS[kind, device, dtype]


def _difference(kind: Kind, ranks: int, device: torch.device, dtype: torch.dtype) -> str | None:
    """Which result differs, on sizes that fill no block; draws no numbers."""
    results = (_linear if kind == "linear" else _feed_forward)(ranks, device, dtype)
    for name, (found, right) in results.items():
        error = float((found.float() - right).norm() / right.norm())
        if not error < _TOLERANCE:
            return f"the {name} is off by {error:.1e}"
    return None


def _values(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Numbers that look random, different for each shape."""
    number = torch.arange(torch.Size(shape).numel(), device=device, dtype=torch.float32)
    return torch.sin(number * number + sum(shape)).view(shape).to(dtype)


@torch.no_grad()
def _linear(ranks: int, device: torch.device, dtype: torch.dtype) -> _Results:
    """The kernels of a mixture on one linear."""
    T, D, O, E, R, scale = 37, 70, 45, 16, ranks // 16, 2.0
    shapes = (T, D), (E, R, D), (E, O, R), (T, O), (T, E)
    x, a, b, base, gates = (_values(device, dtype, *shape) for shape in shapes)
    gates, grad = gates.float(), base / 2
    seed = torch.zeros(1, dtype=torch.long, device=device)  # at p = 0 numbers are drawn and nothing is dropped
    ops = torch.ops.moelora
    y, inner = ops.mixture_linear(x, a, b, gates, base, seed, scale, 0.0)
    grad_inner, grad_x, grad_gates = ops.mixture_linear_token_grads(
        grad, a, b, gates, inner, seed, scale, 0.0, True, True
    )
    sums = ops.mixture_linear_factor_grads(grad, x, gates, inner, grad_inner, seed, E, scale, 0.0)
    grad_a, grad_b = sums.float().sum(0).split([a.numel(), b.numel()])
    x, a_MD, b_MO, grad = x.float(), a.float().flatten(0, 1), b.float().mT.flatten(0, 1), grad.float()
    gate_TM = gates.repeat_interleave(R, 1)
    inner_TM = x @ a_MD.t()
    grad_TM = scale * grad @ b_MO.t()
    return {
        "output": (y, base + scale * (inner_TM * gate_TM) @ b_MO),
        "gradient of the tokens": (grad_x, (grad_TM * gate_TM) @ a_MD),
        "gradient of the gates": (grad_gates, (grad_TM * inner_TM).view(T, E, R).sum(-1)),
        "gradient of A": (grad_a.view(E * R, D), (grad_TM * gate_TM).t() @ x),
        "gradient of B": (grad_b.view(E, O, R).mT.flatten(0, 1), scale * (inner_TM * gate_TM).t() @ grad),
    }


def _feed_forward(ranks: int, device: torch.device, dtype: torch.dtype) -> _Results:
    """The kernels of a mixture on a gated block, whose gradients autograd gives for the right result."""
    T, W, E, R, M, K, scales = 37, 70, 16, ranks // 16, ranks, 2, [0.3, 0.2, 2.0]
    shapes = (T, W), (T, W + 1), (T, M), (T, M + 1), (E, W, R), (E + 1, W, R), (E, R, W), (T, K)
    up, gate, up_inner, gate_inner, up_b, gate_b, down_a, weights = (_values(device, dtype, *shape) for shape in shapes)
    given = (
        up,
        gate[:, :W].contiguous(),
        up_inner,
        gate_inner[:, :M].contiguous(),
        up_b,
        gate_b[:E].contiguous(),
        down_a,
        weights.float(),
    )
    t = torch.arange(T, device=device)
    ids = torch.stack([t % E, (t + 1 + t % (E - 1)) % E], 1)  # two different ones of each token
    seed = torch.zeros(1, dtype=torch.long, device=device)
    mine = [tensor.clone().requires_grad_() for tensor in given]
    right = [tensor.float().requires_grad_() for tensor in given]
    y, parts = torch.ops.moelora.mixture_hidden(*mine, ids, seed, scales, 0.0, "silu", False)
    inner = parts.float().sum(0)
    expected = _right_hidden(right, ids, scales)
    outputs = {"hidden units": (y, expected[0]), "inner activations on down": (inner, expected[1])}
    upstream = _values(device, dtype, T, W + 2)[:, :W], _values(device, dtype, T, M + 2)[:, :M] / 2
    grads = [
        torch.autograd.grad(outputs_of, leaves, [g.to(y.dtype) for g, y in zip(upstream, outputs_of, strict=True)])
        for outputs_of, leaves in (((y, inner), mine), (expected, right))
    ]
    names = ("up", "gate", "up's A x", "gate's A x", "up's B", "gate's B", "down's A", "the weights")
    found = {f"gradient of {name}": pair for name, *pair in zip(names, *grads, strict=True)}
    return {name: (one.detach(), other.detach()) for name, (one, other) in {**outputs, **found}.items()}


def _right_hidden(tensors: list[Tensor], ids_TK: Tensor, scales: list[float]) -> tuple[Tensor, Tensor]:
    """The hidden units and the inner activations on down, in plain products."""
    up_TF, gate_TF, up_inner, gate_inner, up_b, gate_b, down_a, weights_TK = tensors
    E, R = down_a.shape[:2]
    y_TF, inner_TM = torch.zeros_like(up_TF), torch.zeros_like(up_inner)
    for k in range(ids_TK.shape[1]):
        own_TM = F.one_hot(ids_TK[:, k], E).repeat_interleave(R, 1)
        a_TF = F.silu(gate_TF + scales[1] * (gate_inner * own_TM) @ gate_b.mT.flatten(0, 1))
        a_TF = a_TF * (up_TF + scales[0] * (up_inner * own_TM) @ up_b.mT.flatten(0, 1)) * weights_TK[:, k : k + 1]
        y_TF = y_TF + a_TF
        inner_TM = inner_TM + scales[2] * own_TM * (a_TF @ down_a.flatten(0, 1).t())
    return y_TF, inner_TM
