"""Scores: from a token to a number for each expert, always in fp32.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x W_r^T` in fp32 whatever the dtypes, under autocast too: top-k flips on rounding errors of half precision."""
    if torch.is_autocast_enabled(x_TD.device.type):
        with torch.autocast(x_TD.device.type, enabled=False):
            return router_logits(x_TD, weight_ED)
    if x_TD.dtype == torch.float32 or not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.linear(x_TD.float(), weight_ED.float())
    return _LogitsOfHalf.apply(x_TD, weight_ED)


class _LogitsOfHalf(torch.autograd.Function):
    """The same with gradients, keeping the tokens in half precision: their fp32 copy is made again, not kept."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return F.linear(x_TD.float(), weight_ED.float())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TE: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        grad_x_TD, grad_weight_ED = None, None
        if ctx.needs_input_grad[1]:
            grad_weight_ED = (grad_TE.t() @ x_TD.float()).to(weight_ED.dtype)
        if ctx.needs_input_grad[0]:
            grad_x_TD = (grad_TE @ weight_ED.float()).to(x_TD.dtype)
        return grad_x_TD, grad_weight_ED


def scores_from_logits(logits_TE: Tensor, score: str) -> tuple[Tensor, Tensor]:
    """Scores to choose and weight by, and the same as a distribution for the balance loss.

    Args:
        logits_TE: Router logits, fp32.
        score: "softmax" or "sigmoid".

    Returns:
        scores_TE and probs_TE; the same tensor for "softmax".
    """
    if score == "softmax":
        probs_TE = logits_TE.softmax(-1)
        return probs_TE, probs_TE
    scores_TE = logits_TE.sigmoid()
    return scores_TE, scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-9)
