"""The same part of a feed-forward mixture as `expert_segments`, with its element-wise work compiled into single loops.

The low-rank products write what each expert adds at its places; one loop then gathers the frozen products' rows, adds,
activates and multiplies. The pre-activations of all choices are kept for the backward pass.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K chosen experts of a token, P places (the
choices sorted by expert, padded).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.expert_segments import SegmentPlan
from moelora.ops.fused_kernels import fused_kernels
from moelora.ops.segments import Segments
from moelora.ops.workspace import scratch


class _FusedSegments(torch.autograd.Function):
    """See `fused_segments`."""

    @staticmethod
    def forward(
        ctx: Any,
        up_TF: Tensor,
        gate_TF: Tensor | None,
        up_inner_TER: Tensor | None,
        gate_inner_TER: Tensor | None,
        up_b_EFR: Tensor | None,
        gate_b_EFR: Tensor | None,
        down_a_ERF: Tensor | None,
        weights_TK: Tensor,
        plan: SegmentPlan,
    ) -> tuple[Tensor, Tensor | None]:
        segments, kernels = plan.segments, fused_kernels(plan.activation)
        P, F = len(segments.token_P), plan.inner_features
        up_inner_PR, gate_inner_PR = plan.take(up_inner_TER), plan.take(gate_inner_TER)
        added_up_PF, added_gate_PF = _scratch("up", up_TF, up_b_EFR, P), None
        up_PF, gate_PF = up_TF.new_empty(P, F), None
        _multiply(segments, up_inner_PR, up_b_EFR, added_up_PF, transposed=True)
        if gate_TF is not None:
            added_gate_PF, gate_PF = _scratch("gate", gate_TF, gate_b_EFR, P), up_TF.new_empty(P, F)
            _multiply(segments, gate_inner_PR, gate_b_EFR, added_gate_PF, transposed=True)
        ctx.save_for_backward(up_PF, gate_PF, up_inner_PR, gate_inner_PR, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK)
        ctx.plan = plan
        hidden_PF = scratch("hidden", P, F, up_TF.dtype)
        kept_PF = None if plan.down_keep_TF is None else scratch("kept", P, F, up_TF.dtype)
        kernels.forward(
            up_TF,
            gate_TF,
            segments.token_P,
            added_up_PF,
            added_gate_PF,
            plan.down_keep_TF,
            up_PF,
            gate_PF,
            hidden_PF,
            kept_PF,
        )
        hidden_TF = torch.empty_like(up_TF)
        kernels.combine(hidden_PF, segments.place_TK, weights_TK, hidden_TF)
        if down_a_ERF is None:
            return hidden_TF, None
        E, R, _ = down_a_ERF.shape
        inner_PR = down_a_ERF.new_empty(P, R)
        _multiply(segments, hidden_PF if kept_PF is None else kept_PF, down_a_ERF, inner_PR, transposed=True)
        inner_PR.mul_(segments.spread(weights_TK).mul_(plan.scaling).to(inner_PR.dtype).unsqueeze(1))
        return hidden_TF, segments.put(inner_PR, torch.Size((len(up_TF), E, R)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden_TF: Tensor, grad_down_inner_TER: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        segments, kernels = plan.segments, fused_kernels(plan.activation)
        # once: checkpointing lets saved tensors be unpacked a single time
        up_PF, gate_PF, up_inner_PR, gate_inner_PR, up_b, gate_b, down_a, weights_TK = ctx.saved_tensors
        P, dtype = len(up_PF), up_PF.dtype
        weights_P = segments.spread(weights_TK)
        grad_weights_P = torch.empty_like(weights_P)
        down_grad_PR = plan.take(grad_down_inner_TER) if down_a is not None else None
        grad_kept_PF = _scratch("hidden", up_PF, down_a, P)
        _multiply(segments, down_grad_PR, down_a, grad_kept_PF)
        grad_up_PF = _scratch("up", up_PF, up_b, P)
        grad_gate_PF = None if gate_PF is None else _scratch("gate", gate_PF, gate_b, P)
        kept_PF = _scratch("kept", up_PF, down_a, P)
        kernels.backward(
            up_PF,
            gate_PF,
            segments.token_P,
            plan.down_keep_TF,
            grad_hidden_TF,
            grad_kept_PF,
            weights_P,
            grad_up_PF,
            grad_gate_PF,
            grad_weights_P,
            kept_PF,
        )
        grad_down_a = None
        if down_a is not None and down_grad_PR is not None:
            down_grad_PR.mul_(weights_P.to(down_grad_PR.dtype).unsqueeze(1))
            grad_down_a = _weight_grad(segments, down_grad_PR, kept_PF, len(down_a))
        up_grads = _factor_grads(plan, grad_up_PF, up_inner_PR, up_b, ctx.needs_input_grad[0], dtype)
        gate_grads: tuple[Tensor | None, ...] = (None, None, None)
        if grad_gate_PF is not None:
            gate_grads = _factor_grads(plan, grad_gate_PF, gate_inner_PR, gate_b, ctx.needs_input_grad[1], dtype)
        return (
            up_grads[0],
            gate_grads[0],
            up_grads[1],
            gate_grads[1],
            up_grads[2],
            gate_grads[2],
            grad_down_a,
            grad_weights_P[segments.place_TK],
            None,
        )


def _scratch(name: str, base: Tensor, factor: Tensor | None, rows: int) -> Tensor:
    """Scratch memory for the product with a factor, in its dtype, or in the block's if there is none."""
    return scratch(name, rows, base.shape[1], base.dtype if factor is None else factor.dtype)


def _multiply(
    segments: Segments, rows_PI: Tensor | None, weight: Tensor | None, out_PO: Tensor, transposed: bool = False
) -> None:
    """`out = rows @ weight[expert]`, or with its transpose; zero where there is no such factor."""
    if rows_PI is None or weight is None:
        out_PO.zero_()
        return
    weights = (weight.transpose(1, 2) if transposed else weight).unbind()
    rows_PI = rows_PI.to(weight.dtype)
    for expert, rows, out in zip(segments.experts, segments.split(rows_PI), segments.split(out_PO), strict=True):
        torch.mm(rows, weights[expert], out=out)


def _weight_grad(segments: Segments, left_PI: Tensor, right_PO: Tensor, num_experts: int) -> Tensor:
    """`left^T right` of each expert's places: [E, I, O]."""
    grad_EIO = right_PO.new_empty(num_experts, left_PI.shape[1], right_PO.shape[1])
    grads = grad_EIO.unbind()
    for i, (left, right) in enumerate(zip(segments.split(left_PI), segments.split(right_PO), strict=True)):
        segments.accumulate(grads, i, left, right)
    for expert in segments.idle:
        grads[expert].zero_()
    return grad_EIO


def _factor_grads(
    plan: SegmentPlan,
    grad_PF: Tensor,
    inner_PR: Tensor | None,
    b_EFR: Tensor | None,
    base_needs_grad: bool,
    base_dtype: torch.dtype,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """From the gradient of a pre-activation those of the frozen product [T, F], the inner activations and B."""
    segments = plan.segments
    grad_TF = None
    if base_needs_grad:
        grad_TF = grad_PF.new_empty(plan.num_tokens, grad_PF.shape[1], dtype=base_dtype)
        fused_kernels(plan.activation).combine(grad_PF, segments.place_TK, None, grad_TF)
    if inner_PR is None or b_EFR is None:
        return grad_TF, None, None
    grad_b_EFR = _weight_grad(segments, grad_PF, inner_PR, len(b_EFR))
    inner_grad_PR = torch.empty_like(inner_PR)
    _multiply(segments, grad_PF, b_EFR, inner_grad_PR)
    shape = torch.Size((plan.num_tokens, len(b_EFR), inner_PR.shape[1]))
    return grad_TF, segments.put(inner_grad_PR.mul_(plan.scaling), shape), grad_b_EFR


def fused_segments(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner_TER: Tensor | None,
    gate_inner_TER: Tensor | None,
    up_b_EFR: Tensor | None,
    gate_b_EFR: Tensor | None,
    down_a_ERF: Tensor | None,
    weights_TK: Tensor,
    plan: SegmentPlan,
) -> tuple[Tensor, Tensor | None]:
    """From the frozen up and gate products to the input of the frozen down product, for all experts.

    Args and returns as `expert_segments`; a fused gate_up comes as its two halves.
    """
    if plan.kind == "fused":
        gate_TF, up_TF = up_TF.chunk(2, dim=-1)
        gate_inner_TER = up_inner_TER
        gate_b_EFR, up_b_EFR = (None, None) if up_b_EFR is None else up_b_EFR.chunk(2, dim=1)
    return _FusedSegments.apply(
        up_TF, gate_TF, up_inner_TER, gate_inner_TER, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK, plan
    )
