"""The capacity of experts, on each sequence alone.

Shape suffixes: B rows, S tokens of a row, T = B * S, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from moelora.routing.batch import Tokens


def within_capacity(
    ids_TK: Tensor,
    num_experts: int,
    capacity_factor: float | None,
    tokens: Tokens,
    assigned_TK: Tensor | None = None,
    capacity: int | None = None,
) -> Tensor:
    """Which choices an expert still has room for (GShard, arXiv 2006.16668, on each sequence alone).

    An expert takes `ceil(capacity_factor * K * S / E)` choices of a sequence of S valid tokens: all first choices in
    token order, then all second choices, and so on. Padding takes no room. Several sequences packed into one row have
    a capacity each.

    Args:
        ids_TK: Chosen experts, best first.
        num_experts: E.
        capacity_factor: Room over that of a perfectly balanced sequence; None with a `capacity`.
        tokens: Which tokens are valid, and which sequence each is in.
        assigned_TK: False for choices that are none (removed by expert dropout) and take no room.
        capacity: The same room for every sequence, whatever its length.

    Returns:
        Boolean kept_TK.
    """
    T, K = ids_TK.shape
    valid_T = tokens.valid_T
    takes_room_TK = valid_T.unsqueeze(-1).expand(T, K)
    if assigned_TK is not None:
        takes_room_TK = takes_room_TK & assigned_TK
    places = _places_in_rows if tokens.sequence_BS is None else _places_in_sequences
    position_TK, length_T1 = places(ids_TK, takes_room_TK, num_experts, tokens)
    if capacity is not None:
        return position_TK <= capacity
    assert capacity_factor is not None
    # in whole numbers: not every device has float64, and float32 would round some capacities up
    rounded = Fraction(capacity_factor).limit_denominator(10_000)
    # 0 would leave no room; `max` of fractions would break torch.compile's graph
    numerator, denominator = (rounded.numerator, rounded.denominator) if rounded.numerator else (1, 10_000)
    unit = denominator * num_experts
    return position_TK <= (length_T1 * (numerator * K) + (unit - 1)) // unit


def _places_in_rows(ids_TK: Tensor, takes_room_TK: Tensor, num_experts: int, tokens: Tokens) -> tuple[Tensor, Tensor]:
    """The place of each choice in the queue of its expert, and the valid tokens of its sequence [T, 1].

    Where each row is a sequence its queue is one count: over the tokens' first choices, then over their second ones.
    """
    (B, S), (T, K) = tokens.valid_BS.shape, ids_TK.shape
    ids_BSK1 = ids_TK.view(B, S, K, 1)
    chosen_BKSE = torch.zeros(B, K, S, num_experts, dtype=torch.bool, device=ids_TK.device)
    chosen_BKSE.transpose(1, 2).scatter_(-1, ids_BSK1, takes_room_TK.view(B, S, K, 1))
    count_BKSE = chosen_BKSE.flatten(1, 2).cumsum(1, dtype=torch.int32).view(chosen_BKSE.shape)
    position_TK = count_BKSE.transpose(1, 2).gather(-1, ids_BSK1).view(T, K)
    length_B1 = tokens.valid_BS.sum(1, keepdim=True)
    return position_TK, length_B1.expand(B, S).reshape(T, 1)


def _places_in_sequences(
    ids_TK: Tensor, takes_room_TK: Tensor, num_experts: int, tokens: Tokens
) -> tuple[Tensor, Tensor]:
    """The same where rows hold several sequences."""
    (T, K), valid_T, (first_T, last_T) = ids_TK.shape, tokens.valid_T, tokens.bounds_T()
    chosen_TKE = torch.zeros(T, K, num_experts, dtype=torch.int32, device=ids_TK.device)
    chosen_TKE.scatter_(-1, ids_TK.unsqueeze(-1), takes_room_TK.to(torch.int32).unsqueeze(-1))
    # counts up to each token, and what of them lies before its sequence
    count_TKE = chosen_TKE.cumsum(0, dtype=torch.int32)
    before_TKE = count_TKE[first_T] - chosen_TKE[first_T]
    # earlier choices of the whole sequence come first
    total_TKE = count_TKE[last_T] - before_TKE
    earlier_TKE = total_TKE.cumsum(1, dtype=torch.int32) - total_TKE
    position_TKE = count_TKE - before_TKE + earlier_TKE
    position_TK = position_TKE.gather(-1, ids_TK.unsqueeze(-1)).squeeze(-1)
    running_T = valid_T.cumsum(0)
    length_T = running_T[last_T] - running_T[first_T] + valid_T[first_T].to(running_T.dtype)
    return position_TK, length_T.unsqueeze(-1)
