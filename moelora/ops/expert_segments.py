"""The part of a feed-forward mixture between its frozen matrix products, sorted by expert, with its own backward pass.

Plain autograd keeps eight [T, F] tensors for each choice and passes over main memory for each of some thirty
operations. Here the tokens are sorted by expert and worked on in tiles that stay in the processor's cache; only
the pre-activations are kept (with more than two choices a token only the frozen products' outputs), the rest is
computed again in the backward pass; and the gradients of all choices leave as one sum, so that each frozen weight has
one product each way.

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
        keeps_pre_activations: Whether the backward pass gets them rather than computing them again: faster, and for two
            choices a token it takes no more memory than one LoRA on the block does.
        down_keep_TF: What is left after LoRA dropout on the input of down's A, scaled; None without dropout.
    """

    segments: Segments
    num_tokens: int
    inner_features: int
    kind: str
    activation: ActivationVjp
    scaling: float
    keeps_pre_activations: bool
    down_keep_TF: Tensor | None

    def take(self, table_TER: Tensor | None) -> Tensor | None:
        """The scaled row of each place in a table of inner activations: [P, R]."""
        return None if table_TER is None else self.segments.take(table_TER).mul_(self.scaling)


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
        up_inner, gate_inner = plan.take(up_inner_TER), plan.take(gate_inner_TER)
        saved = (up_TF, gate_TF, up_inner, gate_inner, up_b_EFR, gate_b_EFR, down_a_ERF, weights_TK)
        ctx.plan = plan
        hidden_PF = scratch("hidden", num_places, plan.inner_features, up_TF.dtype)
        pre_activations = _PreActivations(saved, plan)
        if plan.keeps_pre_activations:
            up_PF, gate_PF = pre_activations.keep_tiles()
            ctx.save_for_backward(up_PF, gate_PF, *saved[2:])
        else:
            ctx.save_for_backward(*saved)
        down_inner_PR, down = None, None
        if down_a_ERF is not None:
            down_inner_PR = down_a_ERF.new_empty(num_places, down_a_ERF.shape[1])
            down = (down_a_ERF.transpose(1, 2).unbind(), segments.split(down_inner_PR))
        for i, (expert, hidden) in enumerate(zip(segments.experts, segments.split(hidden_PF), strict=True)):
            up, gate = pre_activations.of_tile(i)
            if gate is None:
                hidden.copy_(plan.activation.forward(up))
            else:
                torch.mul(plan.activation.forward(gate), up, out=hidden)
            if down is not None:
                down_a_FR, inner = down[0][expert], down[1][i]
                torch.mm(pre_activations.keep(hidden, i).to(down_a_FR.dtype), down_a_FR, out=inner)
        hidden_TF = segments.combine(hidden_PF, weights_TK)
        if down_a_ERF is None or down_inner_PR is None:
            return hidden_TF, None
        weights_P1 = segments.spread(weights_TK).mul_(plan.scaling).to(down_inner_PR.dtype).unsqueeze(1)
        E, R, _ = down_a_ERF.shape
        return hidden_TF, segments.put(down_inner_PR.mul_(weights_P1), torch.Size((len(up_TF), E, R)))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden_TF: Tensor, grad_down_inner_TER: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: SegmentPlan = ctx.plan
        segments = plan.segments
        saved = ctx.saved_tensors  # once: checkpointing lets saved tensors be unpacked a single time
        up_base, gate_base, up_inner, gate_inner, up_b, gate_b, down_a, weights_TK = saved
        weights_P = segments.spread(weights_TK)
        grad_weights_P = torch.empty_like(weights_P)
        grad_weights = segments.split(grad_weights_P)
        down = _Factor(down_a, plan.take(grad_down_inner_TER), weights_P, segments)
        up_factor = _Factor(up_b, up_inner, weights_P, segments)
        gate_factor = _Factor(gate_b, gate_inner, weights_P, segments)
        width, dtype = up_base.shape[1], up_base.dtype
        grad_up_PF = scratch("grad_up", len(weights_P), width, dtype)
        grad_ups = segments.split(grad_up_PF)
        grad_gate_PF = None if gate_base is None else scratch("grad_gate", len(weights_P), width, dtype)
        grad_gates = () if grad_gate_PF is None else segments.split(grad_gate_PF)
        pre_activations = _PreActivations(saved, plan, kept=plan.keeps_pre_activations)
        for i, grad_up in enumerate(grad_ups):
            up, gate = pre_activations.of_tile(i)
            act = plan.activation.forward(up if gate is None else gate)
            hidden = act if gate is None else act * up
            grad = _load("grad_hidden", grad_hidden_TF, pre_activations.rows[i])
            if down.active:
                down.add_weight_grad(i, pre_activations.keep(hidden, i))
                if plan.down_keep_TF is None:
                    _add_product(grad, down.inner[i], down.weights[segments.experts[i]])
                else:
                    grad.add_(pre_activations.keep(down.inner[i] @ down.weights[segments.experts[i]], i))
            torch.sum(grad * hidden, -1, dtype=weights_P.dtype, out=grad_weights[i])
            if gate is None:
                plan.activation.backward(grad, up, grad_up)
            elif plan.kind == "fused":
                torch.mul(grad, act, out=grad_up[:, width // 2 :])
                plan.activation.backward(grad.mul_(up), gate, grad_up[:, : width // 2])
            else:
                torch.mul(grad, act, out=grad_up)
                plan.activation.backward(grad.mul_(up), gate, grad_gates[i])
                gate_factor.add_grads(i, grad_gates[i])
            up_factor.add_grads(i, grad_up)
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
        self.active = weight is not None and inner_PR is not None
        self.weight_grad: Tensor | None = None
        if weight is None or inner_PR is None:
            return
        self.segments = segments
        self.weights = weight.unbind()
        self.inner = segments.split(inner_PR)
        self.weights_P1 = weights_P.to(inner_PR.dtype).unsqueeze(1)
        self.weighted = segments.split(inner_PR * self.weights_P1)
        self.inner_grad_PR = torch.empty_like(inner_PR)
        self.inner_grads = segments.split(self.inner_grad_PR)
        self.weight_grad = torch.empty_like(weight)
        self.weight_grads = self.weight_grad.unbind()
        for expert in segments.idle:
            self.weight_grads[expert].zero_()

    def add_weight_grad(self, i: int, hidden_NF: Tensor) -> None:
        """The share of one tile, for A of down."""
        weighted_NR = self.weighted[i]
        self.segments.accumulate(self.weight_grads, i, weighted_NR, hidden_NF.to(weighted_NR.dtype))

    def add_grads(self, i: int, grad_NF: Tensor) -> None:
        """The share of one tile, for B of up or gate and its inner activations."""
        if not self.active:
            return
        weight = self.weights[self.segments.experts[i]]
        grad_NF = grad_NF.to(weight.dtype)
        self.segments.accumulate(self.weight_grads, i, grad_NF, self.weighted[i])
        torch.mm(grad_NF, weight, out=self.inner_grads[i])

    def inner_grad(self, plan: SegmentPlan) -> Tensor | None:
        """The gradient of the inner activations of all experts: [T, E, R]."""
        if not self.active:
            return None
        rows_PR = self.inner_grad_PR.mul_(self.weights_P1).mul_(plan.scaling)
        shape = torch.Size((plan.num_tokens, len(self.weights), rows_PR.shape[1]))
        return plan.segments.put(rows_PR, shape)


class _PreActivations:
    """Inputs of the activation and of the product with it, a tile at a time.

    Args:
        saved: What the backward pass gets; with `kept` its first two are the pre-activations themselves [P, F].
        plan: The rest.
        kept: Whether they were computed before.
    """

    def __init__(self, saved: tuple[Any, ...], plan: SegmentPlan, kept: bool = False) -> None:
        self.up, self.gate, up_inner, gate_inner, up_b, gate_b, _, _ = saved
        self.plan = plan
        self.rows = plan.segments.split(plan.segments.token_P)
        self.up_tiles: tuple[Tensor, ...] | None = None
        self.gate_tiles: tuple[Tensor, ...] | None = None
        self.kept = kept
        if kept:
            self._split(self.up, self.gate)
        else:
            self.up_lora, self.gate_lora = self._lora(up_inner, up_b), self._lora(gate_inner, gate_b)

    def _split(self, up_PF: Tensor, gate_PF: Tensor | None) -> None:
        self.up_tiles = self.plan.segments.split(up_PF)
        self.gate_tiles = None if gate_PF is None else self.plan.segments.split(gate_PF)

    def keep_tiles(self) -> tuple[Tensor, Tensor | None]:
        """Memory for all tiles, that `of_tile` fills, instead of scratch memory."""
        num_places = len(self.plan.segments.token_P)
        up_PF = self.up.new_empty(num_places, self.up.shape[1])
        gate_PF = None if self.gate is None else self.gate.new_empty(num_places, self.gate.shape[1])
        self._split(up_PF, gate_PF)
        return up_PF, gate_PF

    def _lora(self, inner_PR: Tensor | None, b_EFR: Tensor | None) -> tuple[tuple[Tensor, ...], ...] | None:
        if inner_PR is None or b_EFR is None:
            return None
        return self.plan.segments.split(inner_PR), b_EFR.transpose(1, 2).unbind()

    def _linear(
        self,
        name: str,
        base_TF: Tensor,
        tiles: tuple[Tensor, ...] | None,
        lora: tuple[tuple[Tensor, ...], ...] | None,
        i: int,
    ) -> Tensor:
        rows_N = self.rows[i]
        tile = scratch(name, len(rows_N), base_TF.shape[1], base_TF.dtype) if tiles is None else tiles[i]
        torch.index_select(base_TF, 0, rows_N, out=tile)
        return tile if lora is None else _add_product(tile, lora[0][i], lora[1][self.plan.segments.experts[i]])

    def of_tile(self, i: int) -> tuple[Tensor, Tensor | None]:
        """(up, gate) of tile i, or (pre, None) in a plain block; valid until the next call."""
        if self.kept:
            assert self.up_tiles is not None
            up, gate = self.up_tiles[i], None if self.gate_tiles is None else self.gate_tiles[i]
        else:
            up, gate = self._linear("up", self.up, self.up_tiles, self.up_lora, i), None
            if self.gate is not None:
                gate = self._linear("gate", self.gate, self.gate_tiles, self.gate_lora, i)
        if self.plan.kind == "fused":
            gate, up = up.chunk(2, dim=-1)
        return up, gate

    def keep(self, rows_NF: Tensor, i: int) -> Tensor:
        """Rows of tile i after LoRA dropout on the input of down's A."""
        if self.plan.down_keep_TF is None:
            return rows_NF
        return rows_NF * self.plan.down_keep_TF[self.rows[i]].to(rows_NF.dtype)


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
