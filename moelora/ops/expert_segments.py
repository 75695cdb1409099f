"""The part of a feed-forward mixture between its frozen matrix products, sorted by expert, with its own backward pass.

Plain autograd keeps eight [T, F] tensors for each choice and passes over main memory for each of some thirty
operations. Here the tokens are sorted by expert and worked on in tiles that stay in the processor's cache; only
the pre-activations are kept (with more than two choices per token only the frozen products' outputs), the rest is
computed again in the backward pass; and the gradients of all choices leave as one sum, so that each frozen weight has
one product each way.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K chosen experts of a token, P places (the
choices sorted by expert, padded), N rows of one tile.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.activation_vjp import ActivationVjp
from moelora.ops.segment_kernels import FrozenProduct, LowRank, SegmentKernels, TileMemory, accumulate, multiply
from moelora.ops.segments import Layout, Segments, Tile


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """What is not a tensor.

    Attributes:
        activation: The block's activation.
        up_scaling, gate_scaling, down_scaling: LoRA's scaling on those linears.
        kernels: Makes the element-wise work of one call.
        keeps_pre_activations: Whether the backward pass gets them rather than computing them again: faster, and for two
            choices per token it takes no more memory than one LoRA on the block does.
    """

    activation: ActivationVjp
    up_scaling: float
    gate_scaling: float
    down_scaling: float
    kernels: Callable[[ActivationVjp, TileMemory], SegmentKernels]
    keeps_pre_activations: bool


class _ExpertSegments(torch.autograd.Function):
    """See `expert_segments`."""

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
        keep_TF: Tensor | None,
        token_P: Tensor,
        row_P: Tensor,
        place_TK: Tensor,
        layout: Layout,
        plan: SegmentPlan,
    ) -> tuple[Tensor, Tensor | None]:
        segments = Segments(layout, token_P, row_P, place_TK)
        P, F = layout.num_places, up_TF.shape[1]
        memory = _memory(up_TF, layout)
        kernels = plan.kernels(plan.activation, memory)
        up_inner_PR = _gather_scaled(segments, up_inner_TER, plan.up_scaling)
        gate_inner_PR = _gather_scaled(segments, gate_inner_TER, plan.gate_scaling)
        up = FrozenProduct(up_TF, _added(up_inner_PR, up_b_EFR, memory))
        gate = None if gate_TF is None else FrozenProduct(gate_TF, _added(gate_inner_PR, gate_b_EFR, memory))
        kept_up_PF, kept_gate_PF = None, None
        if plan.keeps_pre_activations:
            kept_up_PF, kept_gate_PF = _kept_memory(up_TF, gate_TF, P)
        hidden_PF = up_TF.new_empty(P, F)
        down_inner_PR = None if down_a_ERF is None else down_a_ERF.new_empty(P, down_a_ERF.shape[1])
        down_a_FR = () if down_a_ERF is None else down_a_ERF.transpose(1, 2).unbind()
        for tile in layout.tiles:
            rows, num_rows = slice(tile.start, tile.stop), tile.stop - tile.start
            hidden_NF, kept_NF = hidden_PF[rows], None
            if down_a_ERF is not None and (keep_TF is not None or down_a_ERF.dtype != up_TF.dtype):
                kept_NF = memory.rows("kept", num_rows, down_a_ERF.dtype)
            if kept_up_PF is not None:
                up_NF, gate_NF = kept_up_PF[rows], None if kept_gate_PF is None else kept_gate_PF[rows]
            else:
                up_NF, gate_NF = _pre_activation_rows(memory, num_rows, up_TF.dtype, gate is not None)
            kernels.forward(tile, token_P[rows], up, gate, keep_TF, up_NF, gate_NF, hidden_NF, kept_NF)
            if down_inner_PR is not None:
                multiply(tile, hidden_NF if kept_NF is None else kept_NF, down_a_FR, down_inner_PR[rows])
        hidden_TF = kernels.combine(segments, hidden_PF, weights_TK)
        ctx.plan, ctx.layout = plan, layout
        ctx.save_for_backward(
            *((up_TF, gate_TF) if kept_up_PF is None else (kept_up_PF, kept_gate_PF)),
            *(up_inner_PR, gate_inner_PR, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK, keep_TF),
            *(token_P, row_P, place_TK),
        )
        if down_inner_PR is None:
            return hidden_TF, None
        weights_P1 = segments.place_values(weights_TK).mul_(plan.down_scaling).to(down_inner_PR.dtype).unsqueeze(1)
        return hidden_TF, segments.scatter_rows(down_inner_PR.mul_(weights_P1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden_TF: Tensor, grad_down_inner_TER: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        layout: Layout = ctx.layout
        # once: checkpointing lets saved tensors be unpacked a single time
        up_XF, gate_XF, up_inner_PR, gate_inner_PR, up_b, gate_b, down_a, weights_TK, keep_TF, *index = (
            ctx.saved_tensors
        )
        segments = Segments(layout, *index)
        P, F, dtype = layout.num_places, up_XF.shape[1], up_XF.dtype
        memory = _memory(up_XF, layout)
        kernels = plan.kernels(plan.activation, memory)
        weights_P = segments.place_values(weights_TK)
        grad_weights_P = torch.empty_like(weights_P)
        down_grad_PR = None
        if down_a is not None and grad_down_inner_TER is not None:
            down_grad_PR = segments.gather_rows(grad_down_inner_TER).mul_(plan.down_scaling)
        down_product = None if down_grad_PR is None else LowRank(down_grad_PR, down_a.unbind(), memory)
        down = _FactorGrad(down_a, down_grad_PR, weights_P, segments)
        up = _FactorGrad(up_b, up_inner_PR, weights_P, segments)
        gate = _FactorGrad(gate_b, gate_inner_PR, weights_P, segments)
        grad_up_PF = up_XF.new_empty(P, F)
        grad_gate_PF = None if gate_XF is None else up_XF.new_empty(P, F)
        base_up = FrozenProduct(up_XF, _added(up_inner_PR, up_b, memory))
        base_gate = None if gate_XF is None else FrozenProduct(gate_XF, _added(gate_inner_PR, gate_b, memory))
        for tile in layout.tiles:
            rows, num_rows = slice(tile.start, tile.stop), tile.stop - tile.start
            token_N = segments.token_P[rows]
            if plan.keeps_pre_activations:
                up_NF, gate_NF = up_XF[rows], None if gate_XF is None else gate_XF[rows]
            else:
                up_NF, gate_NF = _pre_activation_rows(memory, num_rows, dtype, gate_XF is not None)
                kernels.forward(tile, token_N, base_up, base_gate, keep_TF, up_NF, gate_NF, None, None)
            kept_NF = memory.rows("kept", num_rows, down.dtype) if down.dtype is not None else None
            grads_up = (grad_up_PF[rows], _wide_rows(memory, "wide_up", num_rows, dtype, up.dtype))
            grads_gate = None
            if grad_gate_PF is not None:
                grads_gate = (grad_gate_PF[rows], _wide_rows(memory, "wide_gate", num_rows, dtype, gate.dtype))
            kernels.backward(
                tile,
                token_N,
                up_NF,
                gate_NF,
                keep_TF,
                grad_hidden_TF,
                down_product,
                grads_up,
                grads_gate,
                grad_weights_P[rows],
                kept_NF,
            )
            if kept_NF is not None:
                down.add_weight_grad(tile, down.weighted_PR[rows], kept_NF)
            up.add_grads(tile, grads_up[0] if grads_up[1] is None else grads_up[1])
            if grads_gate is not None:
                gate.add_grads(tile, grads_gate[0] if grads_gate[1] is None else grads_gate[1])
        needs_up, needs_gate = ctx.needs_input_grad[:2]
        return (
            kernels.combine(segments, grad_up_PF, weights_TK) if needs_up else None,
            kernels.combine(segments, grad_gate_PF, weights_TK) if grad_gate_PF is not None and needs_gate else None,
            up.inner_grad(plan.up_scaling),
            gate.inner_grad(plan.gate_scaling),
            up.weight_grad,
            gate.weight_grad,
            down.weight_grad,
            grad_weights_P[segments.place_TK],
            *(None,) * 6,
        )


def _memory(like_TF: Tensor, layout: Layout) -> TileMemory:
    return TileMemory(like_TF, layout.max_rows, like_TF.shape[1])


def _kept_memory(up_TF: Tensor, gate_TF: Tensor | None, P: int) -> tuple[Tensor, Tensor | None]:
    """Memory for the pre-activations of up and gate."""
    F = up_TF.shape[1]
    if gate_TF is None or up_TF.is_contiguous():
        return up_TF.new_empty(P, F), None if gate_TF is None else up_TF.new_empty(P, F)
    # Halves of one linear's output: side by side as there, since vector units round an activation by its memory layout.
    gate_PF, up_PF = up_TF.new_empty(P, 2 * F).chunk(2, dim=-1)
    return up_PF, gate_PF


def _gather_scaled(segments: Segments, table_TER: Tensor | None, scaling: float) -> Tensor | None:
    return None if table_TER is None else segments.gather_rows(table_TER).mul_(scaling)


def _added(inner_PR: Tensor | None, b_EFR: Tensor | None, memory: TileMemory) -> LowRank | None:
    if inner_PR is None or b_EFR is None:
        return None
    return LowRank(inner_PR, b_EFR.transpose(1, 2).unbind(), memory)


def _pre_activation_rows(
    memory: TileMemory, num_rows: int, dtype: torch.dtype, gated: bool
) -> tuple[Tensor, Tensor | None]:
    up_NF = memory.rows("up_rows", num_rows, dtype)
    return up_NF, memory.rows("gate_rows", num_rows, dtype) if gated else None


def _wide_rows(
    memory: TileMemory, name: str, num_rows: int, dtype: torch.dtype, expert_dtype: torch.dtype | None
) -> Tensor | None:
    """Memory for rows in the dtype of the experts, where there are experts and it is another than the block's."""
    return None if expert_dtype in (None, dtype) else memory.rows(name, num_rows, expert_dtype)


class _FactorGrad:
    """The gradient of one stacked low-rank factor, and of the inner activations beside it.

    Args:
        weight: B [E, F, R] of up or gate, A [E, R, F] of down, or None if the linear has no experts.
        inner_PR: What the factor meets in the product: the scaled inner activations, or for down their gradient.
        weights_P: Weight of each place.
        segments: The sorted choices.
    """

    def __init__(self, weight: Tensor | None, inner_PR: Tensor | None, weights_P: Tensor, segments: Segments) -> None:
        self.dtype: torch.dtype | None = None
        self.weight_grad: Tensor | None = None
        if weight is None or inner_PR is None:
            return
        self.dtype = weight.dtype
        self.segments = segments
        self.weights = weight.unbind()
        self.weights_P1 = weights_P.to(weight.dtype).unsqueeze(1)
        self.weighted_PR = inner_PR * self.weights_P1
        self.inner_grad_PR = torch.empty_like(inner_PR)
        self.weight_grad = weight.new_empty(weight.shape)
        self.weight_grads = self.weight_grad.unbind()
        for expert in segments.layout.idle:
            self.weight_grads[expert].zero_()

    def add_weight_grad(self, tile: Tile, left_NI: Tensor, right_NO: Tensor) -> None:
        """The share of one tile."""
        accumulate(tile, left_NI, right_NO, self.weight_grads)

    def add_grads(self, tile: Tile, grad_NF: Tensor) -> None:
        """The share of one tile for B of up or gate, and its inner activations."""
        if self.dtype is None:
            return
        rows = slice(tile.start, tile.stop)
        self.add_weight_grad(tile, grad_NF, self.weighted_PR[rows])
        multiply(tile, grad_NF, self.weights, self.inner_grad_PR[rows])

    def inner_grad(self, scaling: float) -> Tensor | None:
        """The gradient of the inner activations of all experts: [T, E, R]."""
        if self.dtype is None:
            return None
        return self.segments.scatter_rows(self.inner_grad_PR.mul_(self.weights_P1).mul_(scaling))


def expert_segments(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner_TER: Tensor | None,
    gate_inner_TER: Tensor | None,
    up_b_EFR: Tensor | None,
    gate_b_EFR: Tensor | None,
    down_a_ERF: Tensor | None,
    weights_TK: Tensor,
    keep_TF: Tensor | None,
    segments: Segments,
    plan: SegmentPlan,
) -> tuple[Tensor, Tensor | None]:
    """From the frozen up and gate products to the input of the frozen down product, for all experts.

    Args:
        up_TF, gate_TF: Outputs of the frozen linears for all tokens; a fused one comes as its two halves.
        up_inner_TER, gate_inner_TER: `A_e x` of all experts.
        up_b_EFR, gate_b_EFR: B of the experts; None, as the inner parts, for a linear without experts.
        down_a_ERF: A of the experts on the down linear, or None.
        weights_TK: Weight of each choice in the output.
        keep_TF: What is left after LoRA dropout on the input of down's A, scaled; None without dropout.
        segments: The sorted choices.
        plan: The rest.

    Returns:
        `sum_k w_k a_k` [T, F], and `scaling * w_e A2_e a_e` [T, E, R], 0 where e was not chosen (None without experts
        on down).
    """
    hidden_TF, inner_TER = _ExpertSegments.apply(
        up_TF,
        gate_TF,
        up_inner_TER,
        gate_inner_TER,
        up_b_EFR,
        gate_b_EFR,
        down_a_ERF,
        weights_TK,
        keep_TF,
        segments.token_P,
        segments.row_P,
        segments.place_TK,
        segments.layout,
        plan,
    )
    return hidden_TF, inner_TER
