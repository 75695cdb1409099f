"""A feed-forward mixture for accelerators: grouped by expert, with a backward pass that computes again what it needs.

Plain autograd keeps some eight [T, F] tensors for each choice. Here the outputs of the shared gate and up products are
kept, and nothing of an expert: pre-activations, activations and dropout masks are made again. Each kind of low-rank
product is one batched product over the groups, so that the number of launches depends neither on the experts nor on the
choices, the FLOPs are those of the chosen experts, and no shape depends on the routing: nothing is read back from the
device.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, K chosen experts of a
token, G groups, S rows of a group, M the ranks of gate and up together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from moelora.autocast import no_autocast
from moelora.ops.activation_vjp import ActivationVjp, activation_vjp
from moelora.ops.drawn_again import DrawnAgain, keep_scale
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.groups import Groups
from moelora.routing.decision import Routing


def grouped_experts(
    x_TD: Tensor,
    up_TF: Tensor,
    gate_TF: Tensor | None,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    """The input of the frozen down product, and what the experts add behind it.

    Args:
        x_TD: Tokens, before LoRA dropout; at least one.
        up_TF, gate_TF: Outputs of the frozen linears.
        routing: Who computes them.
        block: The frozen block, without a dropout of its own between activation and `down`.
        experts: The experts.

    Returns:
        hidden_TF in the block's dtype, and delta_TD in the experts' (None without experts on down).
    """
    found = [factors for factors in (experts.up, experts.gate, experts.down) if factors is not None]
    rank = max((factors.b_EOR.shape[2] for factors in found), default=1)
    if routing.ids_TK is None:
        groups = Groups.dense(len(x_TD), routing.num_experts, x_TD.device)
    else:
        groups = Groups.of(routing.ids_TK, routing.num_experts, rank)
    p = experts.dropout_p
    entries = [(up_TF, experts.up), *([] if gate_TF is None else [(gate_TF, experts.gate)])]
    plan = _Plan(
        activation_vjp(block.activation),
        block.kind == "fused",
        tuple(1.0 if factors is None else factors.scaling for _, factors in entries),
        1.0 if experts.down is None else experts.down.scaling,
        DrawnAgain.of(p) if any(factors is not None for _, factors in entries) else None,
        DrawnAgain.of(p) if experts.down is not None else None,
    )
    tensors: list[Tensor | None] = [base_TF for base_TF, _ in entries]
    for factors in (*(factors for _, factors in entries), experts.down):
        tensors += [None, None] if factors is None else [factors.expanded_a_ERD(), factors.b_EOR]
    index = [getattr(groups, field.name) for field in fields(groups)]
    with no_autocast(x_TD.device):
        hidden_TF, delta_TD = _GroupedExperts.apply(plan, x_TD, routing.weights_TK, *index, *tensors)
    return hidden_TF, delta_TD


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is not a tensor.

    Attributes:
        activation: The block's activation.
        fused: Whether the one linear before it gives the halves of gate and up.
        scalings: LoRA's scaling on up and, where it is a linear of its own, on gate.
        down_scaling: The same on down.
        input_dropout, hidden_dropout: Dropout in front of their A.
    """

    activation: ActivationVjp
    fused: bool
    scalings: tuple[float, ...]
    down_scaling: float
    input_dropout: DrawnAgain | None
    hidden_dropout: DrawnAgain | None

    @property
    def scales(self) -> list[float]:
        """The scalings of up and gate, and what dropout scales by."""
        return [scaling * keep_scale(self.input_dropout) for scaling in self.scalings]

    @property
    def down_scale(self) -> float:
        """The same for down."""
        return self.down_scaling * keep_scale(self.hidden_dropout)


@dataclass(frozen=True, eq=False)
class _LowRank:
    """The experts on up or gate, as both passes use them.

    Attributes:
        number: 0 of up, 1 of gate.
        b_GFR: B of each group's expert.
        inner_GSR: `A_e x`.
        scale: LoRA's scaling, and what dropout scales by.
    """

    number: int
    b_GFR: Tensor
    inner_GSR: Tensor
    scale: float


class _Before:
    """From the tokens to the pre-activations of all choices, which both passes make.

    Attributes:
        pre: Pre-activations [G, S, F] of up and, where it is a linear of its own, of gate.
        low_rank: The experts of those that have any.
        a_GMD: A of these together.
        x_GSD: What A sees.
        mask_TD: The mask of the dropout in front of A.
    """

    def __init__(
        self, plan: _Plan, groups: Groups, x_TD: Tensor, bases: Sequence[Tensor], factors: Sequence[Tensor | None]
    ) -> None:
        self.pre = [groups.gather(base_TF) for base_TF in bases]
        self.low_rank: list[_LowRank] = []
        self.a_GMD = self.x_GSD = self.mask_TD = None
        stacks = [a_ERD for a_ERD in factors[::2] if a_ERD is not None]
        if not stacks:
            return
        seen_TD = x_TD.to(stacks[0].dtype)
        if plan.input_dropout is not None:
            self.mask_TD = plan.input_dropout.mask(seen_TD)
            seen_TD = seen_TD * self.mask_TD
        self.x_GSD = groups.gather(seen_TD)
        self.a_GMD = groups.factors(stacks[0] if len(stacks) == 1 else torch.cat(stacks, 1))
        inner = iter(torch.bmm(self.x_GSD, self.a_GMD.mT).split([a_ERD.shape[1] for a_ERD in stacks], -1))
        for i, b_EFR in enumerate(factors[1::2]):
            if b_EFR is not None:
                found = _LowRank(i, groups.factors(b_EFR), next(inner), plan.scales[i])
                _add_product(self.pre[i], found.inner_GSR, found.b_GFR.mT, found.scale)
                self.low_rank.append(found)

    def halves(self, fused: bool) -> tuple[Tensor, Tensor | None]:
        """The pre-activations of up and gate."""
        if fused:
            gate_GSF, up_GSF = self.pre[0].chunk(2, -1)
            return up_GSF, gate_GSF
        return self.pre[0], self.pre[1] if len(self.pre) > 1 else None


_NUM_INDEX = len(fields(Groups))


class _GroupedExperts(torch.autograd.Function):
    """See `grouped_experts`."""

    @staticmethod
    def forward(
        ctx: Any, plan: _Plan, x_TD: Tensor, weights_TK: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        groups, bases, factors, (down_a, down_b) = _parts(plan, tensors)
        up_GSF, gate_GSF = _Before(plan, groups, x_TD, bases, factors).halves(plan.fused)
        act_GSF = plan.activation.forward(up_GSF if gate_GSF is None else gate_GSF)
        if gate_GSF is not None:
            act_GSF = act_GSF.mul_(up_GSF)
        hidden_TF = groups.combine(act_GSF, weights_TK)
        weights_GS1 = groups.place_values(weights_TK)
        ctx.plan = plan
        ctx.save_for_backward(x_TD, weights_GS1, *tensors)
        if down_a is None or down_b is None:
            return hidden_TF, None
        if plan.hidden_dropout is not None:
            act_GSF = act_GSF.mul_(plan.hidden_dropout.mask(act_GSF))
        inner_GSR = _product(act_GSF.to(down_a.dtype), groups.factors(down_a).mT, plan.down_scale).mul_(weights_GS1)
        return hidden_TF, groups.combine(torch.bmm(inner_GSR, groups.factors(down_b).mT))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_hidden_TF: Tensor, grad_delta_TD: Tensor | None) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x_TD, weights_GS1, *tensors = ctx.saved_tensors
        groups, bases, factors, (down_a, down_b) = _parts(plan, tensors)
        before = _Before(plan, groups, x_TD, bases, factors)
        up_GSF, gate_GSF = before.halves(plan.fused)
        active_GSF = plan.activation.forward(up_GSF if gate_GSF is None else gate_GSF)
        act_GSF = active_GSF if gate_GSF is None else active_GSF * up_GSF
        grad_act_GSF = groups.gather(grad_hidden_TF)
        down_grads: tuple[Tensor | None, Tensor | None] = None, None
        if down_a is not None and down_b is not None and grad_delta_TD is not None:
            down_grads = _down_grads(
                plan,
                groups,
                act_GSF,
                groups.factors(down_a),
                groups.factors(down_b),
                grad_delta_TD,
                grad_act_GSF,
                weights_GS1,
            )
        # of the weights, before they are multiplied in
        grad_weights_P = (grad_act_GSF * act_GSF).sum(-1, dtype=weights_GS1.dtype).flatten()
        grad_act_GSF.mul_(weights_GS1)
        grads_GSX, grads = _activation_grads(plan, up_GSF, gate_GSF, active_GSF, grad_act_GSF)
        needs = ctx.needs_input_grad
        grad_bases: list[Tensor | None] = [None] * len(bases)
        if any(needs[3 + _NUM_INDEX :][: len(bases)]):
            grads_TX = groups.combine(grads_GSX)
            grad_bases = list(grads_TX.chunk(2, -1)[::-1]) if len(bases) > 1 else [grads_TX]
        grad_x_TD, grad_factors = _low_rank_grads(groups, before, grads, needs[1])
        if grad_x_TD is not None:
            grad_x_TD = grad_x_TD.to(x_TD.dtype)
        grad_weights_TK = grad_weights_P[groups.place_TK]
        return None, grad_x_TD, grad_weights_TK, *(None,) * _NUM_INDEX, *grad_bases, *grad_factors, *down_grads


def _parts(
    plan: _Plan, tensors: Sequence[Any]
) -> tuple[Groups, Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]:
    """The groups, outputs of the frozen linears, A and B of each of these, and of down."""
    num_bases = len(plan.scalings)
    index, rest = tensors[:_NUM_INDEX], tensors[_NUM_INDEX:]
    return Groups(*index), rest[:num_bases], rest[num_bases:-2], rest[-2:]


def _add_product(rows: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """`rows += scale * left @ right`, in one product where the dtypes agree."""
    if rows.dtype == left.dtype:
        rows.baddbmm_(left, right, alpha=scale)
    else:
        rows.add_(torch.bmm(left, right), alpha=scale)


def _product(left: Tensor, right: Tensor, scale: float, out: Tensor | None = None) -> Tensor:
    """`scale * left @ right` in one launch."""
    return torch.baddbmm(left.new_empty(()), left, right, beta=0, alpha=scale, out=out)


def _down_grads(
    plan: _Plan,
    groups: Groups,
    act_GSF: Tensor,
    a_GRF: Tensor,
    b_GDR: Tensor,
    grad_delta_TD: Tensor,
    grad_act_GSF: Tensor,
    weights_GS1: Tensor,
) -> tuple[Tensor, Tensor]:
    """The gradients of down's A and B; that of the activations, before the weights, is added to `grad_act_GSF`."""
    grad_GSD = groups.gather(grad_delta_TD)
    grad_inner_GSR = _product(grad_GSD, b_GDR, plan.down_scale)
    if plan.hidden_dropout is None:
        seen_GSF = act_GSF.to(a_GRF.dtype)
        _add_product(grad_act_GSF, grad_inner_GSR, a_GRF, 1.0)
    else:
        mask_GSF = plan.hidden_dropout.mask(act_GSF)
        seen_GSF = (act_GSF * mask_GSF).to(a_GRF.dtype)
        grad_act_GSF.addcmul_(torch.bmm(grad_inner_GSR, a_GRF).to(grad_act_GSF.dtype), mask_GSF)
    inner_GSR = _product(seen_GSF, a_GRF.mT, plan.down_scale).mul_(weights_GS1)
    grad_inner_GSR.mul_(weights_GS1)
    grad_a_ERF = groups.sum_by_expert(torch.bmm(grad_inner_GSR.mT, seen_GSF))
    return grad_a_ERF, groups.sum_by_expert(torch.bmm(grad_GSD.mT, inner_GSR))


def _activation_grads(
    plan: _Plan, up_GSF: Tensor, gate_GSF: Tensor | None, active_GSF: Tensor, grad_act_GSF: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """The gradients of the pre-activations in one tensor, and its parts for each of `_Before.pre`.

    It writes into `grad_act_GSF`.
    """
    if gate_GSF is None:
        grad_up_GSF = torch.empty_like(grad_act_GSF)
        plan.activation.backward(grad_act_GSF, up_GSF, grad_up_GSF)
        return grad_up_GSF, [grad_up_GSF]
    both = grad_act_GSF.new_empty(*grad_act_GSF.shape[:2], 2 * grad_act_GSF.shape[2])
    grad_gate_GSF, grad_up_GSF = both.chunk(2, -1)
    torch.mul(grad_act_GSF, active_GSF, out=grad_up_GSF)
    plan.activation.backward(grad_act_GSF.mul_(up_GSF), gate_GSF, grad_gate_GSF)
    return both, [both] if plan.fused else [grad_up_GSF, grad_gate_GSF]


def _low_rank_grads(
    groups: Groups, before: _Before, grads: Sequence[Tensor], needs_x: bool
) -> tuple[Tensor | None, list[Tensor | None]]:
    """The gradient of the tokens through A, and those of A and B of up and gate."""
    found: list[Tensor | None] = [None] * (2 * len(grads))
    if before.a_GMD is None or before.x_GSD is None:
        return None, found
    grad_inner_GSM = before.x_GSD.new_empty(*before.x_GSD.shape[:2], before.a_GMD.shape[1])
    ranks = [each.b_GFR.shape[2] for each in before.low_rank]
    for each, grad_inner_GSR in zip(before.low_rank, grad_inner_GSM.split(ranks, -1), strict=True):
        wide_GSF = grads[each.number].to(before.x_GSD.dtype)
        _product(wide_GSF, each.b_GFR, each.scale, out=grad_inner_GSR)
        found[2 * each.number + 1] = groups.sum_by_expert(_product(wide_GSF.mT, each.inner_GSR, each.scale))
    grad_a_EMD = groups.sum_by_expert(torch.bmm(grad_inner_GSM.mT, before.x_GSD))
    for each, grad_a_ERD in zip(before.low_rank, grad_a_EMD.split(ranks, 1), strict=True):
        found[2 * each.number] = grad_a_ERD
    if not needs_x:
        return None, found
    grad_x_TD = groups.combine(torch.bmm(grad_inner_GSM, before.a_GMD))
    return grad_x_TD if before.mask_TD is None else grad_x_TD.mul_(before.mask_TD), found
