"""The part of a feed-forward mixture between its frozen matrix products, sorted by expert, with its own backward pass.

Plain autograd keeps eight [T, F] tensors for each choice and passes over main memory for each of some thirty
operations. Here the tokens are sorted by expert and worked on in tiles that stay in the processor's cache; only the
frozen products' outputs are kept, the rest is computed again in the backward pass; and the gradients of all choices
leave as one sum, so that each frozen weight has one product each way.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K chosen experts of a token, P places (the
choices sorted by expert, padded), N rows of one tile.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.ops.activation_vjp import ActivationVjp
from moelora.ops.segments import Segments
from moelora.ops.workspace import scratch


@dataclass(frozen=True, eq=False)
class SegmentPlan:
    """What does not need a gradient.

    Attributes:
        segments: The sorted choices.
        num_tokens: T.
        inner_features: F.
        kind: Form of the block.
        activation: Its activation.
        scaling: LoRA's scaling.
        down_keep_TF: What is left after LoRA dropout on the input of down's A, scaled; None without dropout.
    """

    segments: Segments
    num_tokens: int
    inner_features: int
    kind: str
    activation: ActivationVjp
    scaling: float
    down_keep_TF: Tensor | None


def _load(name: str, base_TF: Tensor, rows_N: Tensor) -> Tensor:
    """Rows of a frozen product's output, in scratch memory."""
    tile = scratch(name, len(rows_N), base_TF.shape[1], base_TF.dtype)
    return torch.index_select(base_TF, 0, rows_N, out=tile)


def _add_product(tile_NF: Tensor, inner_NR: Tensor, weight_RF: Tensor) -> Tensor:
    """`tile += inner @ weight`, in place; adapters may be of higher precision than the block."""
    if tile_NF.dtype == inner_NR.dtype:
        return tile_NF.addmm_(inner_NR, weight_RF)
    return tile_NF.add_(inner_NR @ weight_RF)


class _ExpertSegments(torch.autograd.Function):
    """See `expert_segments`.

    The weight of a choice is never applied to a tile: it rides on the small side of each product and on the sum over a
    token's choices.
    """

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
        segments = plan.segments
        num_places = len(segments.token_P)
        up_inner, gate_inner = _take(up_inner_TER, plan), _take(gate_inner_TER, plan)
        saved = (up_TF, gate_TF, up_inner, gate_inner, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK)
        ctx.save_for_backward(*saved)
        ctx.plan = plan
        hidden_PF = scratch("hidden", num_places, plan.inner_features, up_TF.dtype)
        down_inner_PR = None if down_a_ERF is None else down_a_ERF.new_empty(num_places, down_a_ERF.shape[1])
        for expert, start, stop in segments.tiles:
            up, gate = _pre_activations(saved, plan, expert, start, stop)
            hidden = hidden_PF[start:stop]
            if gate is None:
                hidden.copy_(plan.activation.forward(up))
            else:
                torch.mul(plan.activation.forward(gate), up, out=hidden)
            if down_a_ERF is not None and down_inner_PR is not None:
                dropped = _keep(hidden, plan, start, stop).to(down_a_ERF.dtype)
                torch.mm(dropped, down_a_ERF[expert].t(), out=down_inner_PR[start:stop])
        hidden_TF = segments.combine(hidden_PF, weights_TK)
        if down_a_ERF is None or down_inner_PR is None:
            return hidden_TF, None
        weights_P1 = segments.spread(weights_TK).mul_(plan.scaling).to(down_inner_PR.dtype).unsqueeze(1)
        E, R, _ = down_a_ERF.shape
        return hidden_TF, segments.put(down_inner_PR.mul_(weights_P1), torch.Size((len(up_TF), E, R)))

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_hidden_TF: Tensor, grad_down_inner_TER: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        segments = plan.segments
        saved = ctx.saved_tensors  # once: checkpointing lets saved tensors be unpacked a single time
        up_TF, gate_TF, up_inner, gate_inner, up_b, gate_b, down_a, weights_TK = saved
        weights_P = segments.spread(weights_TK)
        grad_weights_P = torch.zeros_like(weights_P)
        down = _Factor(down_a, _take(grad_down_inner_TER, plan), weights_P, segments)
        up_factor = _Factor(up_b, up_inner, weights_P, segments)
        gate_factor = _Factor(gate_b, gate_inner, weights_P, segments)
        grad_up_PF = scratch("grad_up", len(weights_P), up_TF.shape[1], up_TF.dtype)
        grad_gate_PF = None if gate_TF is None else scratch("grad_gate", len(weights_P), up_TF.shape[1], up_TF.dtype)
        for expert, start, stop in segments.tiles:
            up, gate = _pre_activations(saved, plan, expert, start, stop)
            act = plan.activation.forward(up if gate is None else gate)
            hidden = act if gate is None else act * up
            grad = _load("grad_hidden", grad_hidden_TF, segments.token_P[start:stop])
            if down.weight is not None and down.inner_PR is not None:
                down.add_weight_grad(expert, start, stop, _keep(hidden, plan, start, stop))
                if plan.down_keep_TF is None:
                    _add_product(grad, down.inner_PR[start:stop], down.weight[expert])
                else:
                    grad.add_(_keep((down.inner_PR[start:stop] @ down.weight[expert]), plan, start, stop))
            grad_weights_P[start:stop] = (grad * hidden).sum(-1, dtype=weights_P.dtype)
            grad_up = grad_up_PF[start:stop]
            if gate is None:
                grad_up.copy_(plan.activation.backward(grad, up))
            elif plan.kind == "fused":
                width = plan.inner_features
                torch.mul(grad, act, out=grad_up[:, width:])
                grad_up[:, :width] = plan.activation.backward(grad.mul_(up), gate)
            else:
                torch.mul(grad, act, out=grad_up)
                grad_gate = grad_gate_PF[start:stop]  # type: ignore[index]
                grad_gate.copy_(plan.activation.backward(grad.mul_(up), gate))
                gate_factor.add_grads(expert, start, stop, grad_gate)
            up_factor.add_grads(expert, start, stop, grad_up)
        return (
            segments.combine(grad_up_PF, weights_TK) if ctx.needs_input_grad[0] else None,
            segments.combine(grad_gate_PF, weights_TK)
            if grad_gate_PF is not None and ctx.needs_input_grad[1]
            else None,
            up_factor.inner_grad(plan),
            gate_factor.inner_grad(plan),
            up_factor.weight_grad,
            gate_factor.weight_grad,
            down.weight_grad,
            grad_weights_P[segments.place_TK],
            None,
        )


class _Factor:
    """One stacked low-rank factor in the backward pass: its gradient, and that of the inner activations beside it.

    Args:
        weight: B [E, F, R] of up or gate, A [E, R, F] of down, or None if the linear has no experts.
        inner_PR: What the factor meets in the product: the inner activations, or for down their gradient.
        weights_P: Weight of each place.
        segments: The sorted choices.
    """

    def __init__(self, weight: Tensor | None, inner_PR: Tensor | None, weights_P: Tensor, segments: Segments) -> None:
        self.weight = weight
        self.inner_PR = inner_PR
        self.weight_grad: Tensor | None = None
        if weight is None or inner_PR is None:
            return
        self.weights_P1 = weights_P.to(inner_PR.dtype).unsqueeze(1)
        self.weighted_PR = inner_PR * self.weights_P1
        self.inner_grad_PR = torch.empty_like(inner_PR)
        self.weight_grad = torch.empty_like(weight)
        for expert in segments.idle:
            self.weight_grad[expert].zero_()
        self._begun: set[int] = set()

    def _accumulate(self, expert: int, left: Tensor, right: Tensor) -> None:
        assert self.weight_grad is not None
        if expert in self._begun:
            self.weight_grad[expert].addmm_(left, right)
        else:
            torch.mm(left, right, out=self.weight_grad[expert])
            self._begun.add(expert)

    def add_weight_grad(self, expert: int, start: int, stop: int, hidden_NF: Tensor) -> None:
        """The share of one tile, for A of down."""
        self._accumulate(expert, self.weighted_PR[start:stop].t(), hidden_NF.to(self.weighted_PR.dtype))

    def add_grads(self, expert: int, start: int, stop: int, grad_NF: Tensor) -> None:
        """The share of one tile, for B of up or gate and its inner activations."""
        if self.weight is None or self.inner_PR is None:
            return
        grad_NF = grad_NF.to(self.weight.dtype)
        self._accumulate(expert, grad_NF.t(), self.weighted_PR[start:stop])
        torch.mm(grad_NF, self.weight[expert], out=self.inner_grad_PR[start:stop])

    def inner_grad(self, plan: SegmentPlan) -> Tensor | None:
        """The gradient of the inner activations of all experts: [T, E, R]."""
        if self.weight is None or self.inner_PR is None:
            return None
        E, _, R = self.weight.shape
        rows_PR = self.inner_grad_PR.mul_(self.weights_P1).mul_(plan.scaling)
        return plan.segments.put(rows_PR, torch.Size((plan.num_tokens, E, R)))


def _take(table_TER: Tensor | None, plan: SegmentPlan) -> Tensor | None:
    return None if table_TER is None else plan.segments.take(table_TER).mul_(plan.scaling)


def _pre_activations(
    saved: tuple[Any, ...], plan: SegmentPlan, expert: int, start: int, stop: int
) -> tuple[Tensor, Tensor | None]:
    """Inputs of the activation and of the product with it on one tile: (up, gate), or (pre, None) in a plain block."""
    up_TF, gate_TF, up_inner, gate_inner, up_b, gate_b, _, _ = saved
    rows_N = plan.segments.token_P[start:stop]
    up = _load("up", up_TF, rows_N)
    if up_inner is not None:
        _add_product(up, up_inner[start:stop], up_b[expert].t())
    if plan.kind == "fused":
        gate, up = up.chunk(2, dim=-1)
        return up, gate
    if gate_TF is None:
        return up, None
    gate = _load("gate", gate_TF, rows_N)
    if gate_inner is not None:
        _add_product(gate, gate_inner[start:stop], gate_b[expert].t())
    return up, gate


def _keep(rows_NF: Tensor, plan: SegmentPlan, start: int, stop: int) -> Tensor:
    """LoRA dropout on the input of down's A."""
    if plan.down_keep_TF is None:
        return rows_NF
    return rows_NF * plan.down_keep_TF[plan.segments.token_P[start:stop]].to(rows_NF.dtype)


def expert_segments(
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

    Args:
        up_TF, gate_TF: Outputs of the frozen linears for all tokens.
        up_inner_TER, gate_inner_TER: `A_e x` of all experts.
        up_b_EFR, gate_b_EFR: B of the experts; None, as the inner parts, for a linear without experts.
        down_a_ERF: A of the experts on the down linear, or None.
        weights_TK: Weight of each choice in the output.
        plan: The rest.

    Returns:
        `sum_k w_k a_k` [T, F], and `scaling * w_e A2_e a_e` [T, E, R], 0 where e was not chosen (None without experts
        on down).
    """
    return _ExpertSegments.apply(
        up_TF, gate_TF, up_inner_TER, gate_inner_TER, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK, plan
    )
