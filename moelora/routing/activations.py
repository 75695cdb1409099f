"""Activations: from scores to the chosen experts and their weights.

Shape suffixes: B sequences, S tokens of a sequence, T = B * S, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor


def top_k_choice(scores_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The `top_k` highest scores of each token, best first: weights_TK and ids_TK."""
    weights_TK, ids_TK = scores_TE.topk(top_k, dim=-1)
    return weights_TK, ids_TK


def renormalize(weights_TK: Tensor, positive: bool = False) -> Tensor:
    """Divide by the sum over the chosen experts; weights that are all 0 (dropped) stay 0.

    The sum may be negative: biased scores are.

    Args:
        weights_TK: Weights.
        positive: Whether the sum is known to be far above 0, as that of a softmax' largest values.
    """
    sum_T1 = weights_TK.sum(-1, keepdim=True)
    if positive:
        return weights_TK / sum_T1
    return weights_TK / torch.where(sum_T1.abs() < 1e-9, 1e-9, sum_T1)


def within_capacity(
    ids_TK: Tensor,
    num_experts: int,
    capacity_factor: float,
    valid_BS: Tensor,
    assigned_TK: Tensor | None = None,
) -> Tensor:
    """Which choices an expert still has room for (GShard, arXiv 2006.16668, on each sequence alone).

    An expert takes `ceil(capacity_factor * K * S / E)` choices of a sequence of S valid tokens: all first choices in
    token order, then all second choices, and so on. Padding takes no room.

    Args:
        ids_TK: Chosen experts, best first.
        num_experts: E.
        capacity_factor: Room over that of a perfectly balanced sequence.
        valid_BS: True where a token is not padding.
        assigned_TK: False for choices that are none (removed by expert dropout) and take no room.

    Returns:
        Boolean kept_TK.
    """
    B, S = valid_BS.shape
    K = ids_TK.shape[-1]
    takes_room_TK = valid_BS.reshape(-1, 1).expand(-1, K)
    if assigned_TK is not None:
        takes_room_TK = takes_room_TK & assigned_TK
    chosen_TKE = torch.zeros(*ids_TK.shape, num_experts, dtype=torch.int32, device=ids_TK.device)
    chosen_TKE.scatter_(-1, ids_TK.unsqueeze(-1), takes_room_TK.to(torch.int32).unsqueeze(-1))
    # choices in order of precedence: choice-major, then token order
    order_BNE = chosen_TKE.view(B, S, K, num_experts).transpose(1, 2).reshape(B, K * S, num_experts)
    position_BNE = order_BNE.cumsum(1, dtype=torch.int32)
    position_BKSE = position_BNE.view(B, K, S, num_experts)
    position_TK = position_BKSE.transpose(1, 2).reshape(B * S, K, num_experts).gather(-1, ids_TK.unsqueeze(-1))
    # in whole numbers: not every device has float64, and float32 would round some capacities up
    factor = Fraction(capacity_factor).limit_denominator(10_000)
    room_B, unit = valid_BS.sum(-1) * (factor.numerator * K), factor.denominator * num_experts
    capacity_B = (room_B + unit - 1) // unit
    capacity_T = capacity_B.unsqueeze(-1).expand(B, S).reshape(-1)
    return position_TK.squeeze(-1) <= capacity_T.unsqueeze(-1)
