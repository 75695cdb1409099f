"""Scores: from a token to a number for each expert, always in fp32.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def router_logits(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x W_r^T` in fp32 whatever the dtypes, under autocast too: top-k flips on rounding errors of half precision."""
    if not torch.is_autocast_enabled(x_TD.device.type):
        return F.linear(x_TD.float(), weight_ED.float())
    with torch.autocast(x_TD.device.type, enabled=False):
        return F.linear(x_TD.float(), weight_ED.float())


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
