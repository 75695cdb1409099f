"""A mixture on one linear for accelerators: one LoRA with a mask between its products, whose backward keeps less.

Beside the tokens, which the frozen linear's neighbours keep anyway, the inner activations are kept, of all ranks; the
masked ones, the joined B and the dropout mask are made again.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, M = E * R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from moelora.autocast import autocast_dtype, no_autocast
from moelora.ops.drawn_again import DrawnAgain, keep_scale
from moelora.ops.factors import Factors


def recomputed_linear(
    x_TD: Tensor, factors: Factors, gates_TE: Tensor | None, base_TO: Tensor | None, p: float
) -> Tensor:
    """See `moelora.ops.mixture_linear`, whose arguments and results these are."""
    dtype = autocast_dtype(x_TD.device)
    if dtype is not None:
        x_TD, factors = x_TD.to(dtype), factors.to(dtype)
    dropout = DrawnAgain.of(p)
    plan = _Plan(factors.scaling * keep_scale(dropout), dropout)
    leading = x_TD.shape[:-1]
    joins = base_TO is not None and base_TO.dtype == x_TD.dtype
    with no_autocast(x_TD.device):
        y_TO: Tensor = _RecomputedLinear.apply(
            plan,
            x_TD.flatten(0, -2),
            base_TO.flatten(0, -2) if joins and base_TO is not None else None,
            gates_TE,
            factors.a_ERD,
            factors.b_EOR,
        )
    y_TO = y_TO.view(*leading, y_TO.shape[-1])
    return y_TO if joins or base_TO is None else base_TO + y_TO


@dataclass(frozen=True, eq=False)
class _Plan:
    """What is not a tensor.

    Attributes:
        scale: LoRA's scaling, and what dropout scales by.
        dropout: Dropout in front of A.
    """

    scale: float
    dropout: DrawnAgain | None


class _RecomputedLinear(torch.autograd.Function):
    """See `recomputed_linear`."""

    @staticmethod
    def forward(
        ctx: Any,
        plan: _Plan,
        x_TD: Tensor,
        base_TO: Tensor | None,
        gates_TE: Tensor | None,
        a_ERD: Tensor,
        b_EOR: Tensor,
    ) -> Tensor:
        seen_TD = x_TD if plan.dropout is None else plan.dropout.mask(x_TD).mul_(x_TD)
        inner_TM = F.linear(seen_TD, a_ERD.flatten(0, 1))
        ctx.plan = plan
        ctx.save_for_backward(x_TD, gates_TE, a_ERD, b_EOR, inner_TM)
        return _scaled_sum(base_TO, _masked_TM(inner_TM, gates_TE, a_ERD), _joined_MO(b_EOR), plan.scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TO: Tensor) -> tuple[Tensor | None, ...]:
        plan: _Plan = ctx.plan
        x_TD, gates_TE, a_ERD, b_EOR, inner_TM = ctx.saved_tensors
        E, O, R = b_EOR.shape
        _, needs_x, needs_base, needs_gates, needs_a, needs_b = ctx.needs_input_grad
        grad_TM = _scaled_sum(None, grad_TO, _joined_MO(b_EOR).t(), plan.scale)
        grad_b_EOR, grad_gates_TE, grad_a_ERD, grad_x_TD = None, None, None, None
        if needs_b:
            masked_TM = _masked_TM(inner_TM, gates_TE, a_ERD)
            if E == 1:
                grad_b_EOR = _scaled_sum(None, grad_TO.t(), masked_TM, plan.scale).unsqueeze(0)
            else:
                grad_MO = _scaled_sum(None, masked_TM.t(), grad_TO, plan.scale)
                grad_b_EOR = grad_MO.view(E, R, O).transpose(1, 2)
        if gates_TE is not None:
            grad_TER, inner_TER = grad_TM.view(-1, E, R), inner_TM.view(-1, len(a_ERD), R)
            if needs_gates:
                grad_gates_TE = (grad_TER * inner_TER).sum(-1, dtype=gates_TE.dtype)
            grad_TER = grad_TER.mul_(gates_TE.unsqueeze(-1))
            grad_TM = (grad_TER if len(a_ERD) == E else grad_TER.sum(1, keepdim=True)).flatten(1)
        if needs_a or (needs_x and plan.dropout is not None):
            mask_TD = None if plan.dropout is None else plan.dropout.mask(x_TD)
            seen_TD = x_TD if mask_TD is None else x_TD * mask_TD
            grad_a_ERD = (grad_TM.t() @ seen_TD).view_as(a_ERD)
        if needs_x:
            grad_x_TD = grad_TM @ a_ERD.flatten(0, 1)
            grad_x_TD = grad_x_TD if plan.dropout is None else grad_x_TD.mul_(mask_TD)
        return None, grad_x_TD, grad_TO if needs_base else None, grad_gates_TE, grad_a_ERD, grad_b_EOR


def _joined_MO(b_EOR: Tensor) -> Tensor:
    """B of all experts as one matrix; a view for one expert."""
    return b_EOR[0].t() if len(b_EOR) == 1 else b_EOR.transpose(1, 2).flatten(0, 1)


def _masked_TM(inner_TM: Tensor, gates_TE: Tensor | None, a_ERD: Tensor) -> Tensor:
    """The inner activations times the weights of their experts; the product is rounded once."""
    if gates_TE is None:
        return inner_TM
    T, E = gates_TE.shape
    R = a_ERD.shape[1]
    masked_TER = inner_TM.new_empty(T, E, R)
    torch.mul(inner_TM.view(T, len(a_ERD), R), gates_TE.unsqueeze(-1), out=masked_TER)
    return masked_TER.flatten(1)


def _scaled_sum(base: Tensor | None, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """`base + scale * left @ right` in one launch."""
    if base is None:
        return left @ right if scale == 1 else torch.addmm(left.new_empty(()), left, right, beta=0, alpha=scale)
    return torch.addmm(base, left, right, alpha=scale)
