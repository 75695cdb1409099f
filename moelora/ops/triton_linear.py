"""A mixture on one linear by Triton's kernels: one launch forward, two to four backward.

Triton comes with torch for CUDA. The operators are torch's own kind, so that `torch.compile` takes them into its graph,
and they have shapes without Triton too.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, M = E * R, S parts of
the tokens.
"""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from moelora.autocast import autocast_dtype
from moelora.ops.factors import Factors
from moelora.ops.triton_check import kernels_work

MOST_RANKS = 256
"""E * R up to which a tile's inner activations stay in registers."""

DTYPES = (torch.bfloat16, torch.float16, torch.float32)

DEVICES = {"cuda"} if find_spec("triton") is not None and os.environ.get("MOELORA_TRITON") != "0" else set[str]()
"""The types of devices whose tensors these kernels compute; `MOELORA_TRITON=0` in the environment leaves none."""

PROGRAMS = 128
"""Programs that keep a large GPU busy, about one for each of its processors."""


def covers(x_TD: Tensor, factors: Factors) -> bool:
    """Whether the kernels compute this: experts with an A of their own, few ranks in all, a dtype that they know.

    At the first such call of a process they are checked.
    """
    dtype = autocast_dtype(x_TD.device) or x_TD.dtype
    E, R, _ = factors.a_ERD.shape
    device = x_TD.device.type
    fits = factors.num_experts == E and E * R <= MOST_RANKS and dtype in DTYPES
    return device in DEVICES and fits and kernels_work("linear", MOST_RANKS, device, dtype)


def is_exported() -> bool:
    """Whether a graph is recorded that has to run where moelora's operators are not."""
    return torch.compiler.is_exporting() or torch.jit.is_tracing()  # type: ignore[attr-defined]


def triton_linear(
    x_TD: Tensor, factors: Factors, gates_TE: Tensor | None, base_TO: Tensor | None, p: float = 0.0
) -> Tensor:
    """See `moelora.ops.mixture_linear`, whose arguments and results these are; what `covers` says is covered.

    Kept for the backward pass are the tokens and the inner activations. Dropout's mask is a function of a seed, which
    the device's generator draws, and of each element's place. A sum with the base's output is rounded once.
    """
    dtype = autocast_dtype(x_TD.device) or x_TD.dtype
    x_TD, factors = x_TD.to(dtype), factors.to(dtype)
    y_TO, _ = torch.ops.moelora.mixture_linear(
        x_TD.flatten(0, -2).contiguous(),
        factors.a_ERD.contiguous(),
        factors.b_EOR.contiguous(),
        None if gates_TE is None else gates_TE.contiguous(),
        None if base_TO is None else base_TO.flatten(0, -2).contiguous(),
        torch.randint(2**62, (1,), device=x_TD.device) if p > 0 else None,
        factors.scaling / (1 - p),
        p,
    )
    found: Tensor = y_TO.view(*x_TD.shape[:-1], y_TO.shape[-1])
    return found


def _blocks(M: int) -> dict[str, int]:
    """Sizes of a program: two stages of its loads in fp32 fit the shared memory of a consumer's GPU, 99 KB."""
    size = max(16, 1 << (M - 1).bit_length())
    return {
        "BT": min(32, 4096 // size),
        "BM": size,
        "BX": min(64, 8192 // size),
        "num_warps": 4 if size <= 64 else 8,
        "num_stages": 2,
    }


def ceil_div(numerator: int, denominator: int) -> int:
    """The quotient, rounded up."""
    return -(-numerator // denominator)


@torch.library.custom_op(
    "moelora::mixture_linear",
    mutates_args=(),
    schema="(Tensor x, Tensor a, Tensor b, Tensor? gates, Tensor? base, Tensor? seed, float scale, float p) "
    "-> (Tensor, Tensor)",
)
def _forward(
    x: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor | None,
    base: Tensor | None,
    seed: Tensor | None,
    scale: float,
    p: float,
) -> tuple[Tensor, Tensor]:
    """`base + scale * B_cat (gates * (A_cat dropout(x)))` [T, O], and the inner activations [T, M]."""
    from moelora.ops.triton_kernels import forward

    y, inner = _forward_shapes(x, a, b, gates, base, seed, scale, p)
    (T, D), (E, O, R) = x.shape, b.shape
    blocks = _blocks(E * R)
    with torch.cuda.device_of(x):
        forward[(ceil_div(T, blocks["BT"]),)](x, a, b, gates, base, seed, y, inner, T, D, O, E, R, scale, p, **blocks)
    return y, inner


@_forward.register_fake
def _forward_shapes(
    x: Tensor, a: Tensor, b: Tensor, gates: Tensor | None, base: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    E, O, R = b.shape
    dtype = x.dtype if base is None else torch.promote_types(x.dtype, base.dtype)
    return x.new_empty(x.shape[0], O, dtype=dtype), x.new_empty(x.shape[0], E * R)


@torch.library.custom_op(
    "moelora::mixture_linear_token_grads",
    mutates_args=(),
    schema="(Tensor grad, Tensor a, Tensor b, Tensor? gates, Tensor inner, Tensor? seed, float scale, float p, "
    "bool needs_x, bool needs_gates) -> (Tensor, Tensor, Tensor)",
)
def _token_grads(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor | None,
    inner: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    needs_x: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of the inner activations, the tokens and the gates; empty ones where they are not needed."""
    from moelora.ops.triton_kernels import token_grads

    found = _token_grads_shapes(grad, a, b, gates, inner, seed, scale, p, needs_x, needs_gates)
    grad_inner, grad_x, grad_gates = found
    (E, R, D), (T, O) = a.shape, grad.shape
    blocks = _blocks(E * R)
    with torch.cuda.device_of(grad):
        token_grads[(ceil_div(T, blocks["BT"]),)](
            grad,
            a,
            b,
            gates,
            inner,
            seed,
            grad_inner,
            grad_x if needs_x else None,
            grad_gates if needs_gates else None,
            T,
            D,
            O,
            E,
            R,
            scale,
            p,
            **blocks,
        )
    return found


@_token_grads.register_fake
def _token_grads_shapes(
    grad: Tensor,
    a: Tensor,
    b: Tensor,
    gates: Tensor | None,
    inner: Tensor,
    seed: Tensor | None,
    scale: float,
    p: float,
    needs_x: bool,
    needs_gates: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = inner.new_empty(inner.shape[0], a.shape[2]) if needs_x else inner.new_empty(0)
    grad_gates = torch.empty_like(gates) if needs_gates and gates is not None else inner.new_empty(0)
    return torch.empty_like(inner), grad_x, grad_gates


@torch.library.custom_op(
    "moelora::mixture_linear_factor_grads",
    mutates_args=(),
    schema="(Tensor grad, Tensor x, Tensor? gates, Tensor inner, Tensor grad_inner, Tensor? seed, int num_experts, "
    "float scale, float p) -> Tensor",
)
def _factor_grads(
    grad: Tensor,
    x: Tensor,
    gates: Tensor | None,
    inner: Tensor,
    grad_inner: Tensor,
    seed: Tensor | None,
    num_experts: int,
    scale: float,
    p: float,
) -> Tensor:
    """The gradients of A [E, R, D] and behind it of B [E, O, R], for each part of the tokens: [S, M * (D + O)]."""
    from moelora.ops.triton_kernels import factor_grads

    sums = _factor_grads_shape(grad, x, gates, inner, grad_inner, seed, num_experts, scale, p)
    (T, D), O, M = x.shape, grad.shape[1], inner.shape[1]
    blocks = _blocks(M)
    tokens = ceil_div(T, len(sums) * blocks["BT"]) * blocks["BT"]
    grid = (ceil_div(D, blocks["BX"]) + ceil_div(O, blocks["BX"]), len(sums))
    R = M // num_experts
    with torch.cuda.device_of(grad):
        factor_grads[grid](
            grad, x, gates, inner, grad_inner, seed, sums, T, D, O, num_experts, R, scale, p, tokens, **blocks
        )
    return sums


@_factor_grads.register_fake
def _factor_grads_shape(grad: Tensor, x: Tensor, gates: Tensor | None, inner: Tensor, *_: object) -> Tensor:
    (T, D), O, M = x.shape, grad.shape[1], inner.shape[1]
    blocks = _blocks(M)
    # by the sizes alone: the same sums in the same order on every device
    wanted = PROGRAMS // (ceil_div(D, blocks["BX"]) + ceil_div(O, blocks["BX"]))
    S = torch.sym_max(torch.sym_min(wanted, ceil_div(T, blocks["BT"])), 1)
    return x.new_empty(S, M * (D + O), dtype=x.dtype if S == 1 else torch.float32)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, a, b, gates, base, seed, ctx.scale, ctx.p = inputs
    ctx.base_dtype = None if base is None else base.dtype
    ctx.set_materialize_grads(False)  # of the inner activations, which nobody else reads
    ctx.save_for_backward(x, a, b, gates, seed, output[1])


def _backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    x, a, b, gates, seed, inner = ctx.saved_tensors
    needs_x, needs_a, needs_b, needs_gates, needs_base, *_rest = ctx.needs_input_grad
    grad = grad.contiguous()
    grad_inner, grad_x, grad_gates = torch.ops.moelora.mixture_linear_token_grads(
        grad, a, b, gates, inner, seed, ctx.scale, ctx.p, needs_x, needs_gates
    )
    grad_a, grad_b = None, None
    if needs_a or needs_b:
        sums = torch.ops.moelora.mixture_linear_factor_grads(
            grad, x, gates, inner, grad_inner, seed, len(b), ctx.scale, ctx.p
        )
        total = (sums[0] if sums.shape[0] == 1 else sums.sum(0)).to(x.dtype)
        grad_a, grad_b = total[: a.numel()].view_as(a), total[a.numel() :].view_as(b)
    return (
        grad_x if needs_x else None,
        grad_a,
        grad_b,
        grad_gates if needs_gates else None,
        grad.to(ctx.base_dtype) if needs_base else None,
        None,
        None,
        None,
    )


_forward.register_autograd(_backward, setup_context=_keep)
