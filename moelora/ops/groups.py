"""The choices of all tokens, grouped by expert into batches of one size.

No shape here depends on who chose whom: there are as many groups as the worst routing needs, and nothing is read back
from the device.

Shape suffixes: T tokens, K chosen experts of a token, E experts, N = T * K choices, G groups, S rows of a group, P = G
* S places, X anything.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


def group_size(num_choices: int, num_experts: int, rank: int) -> int:
    """S, a power of two from 16 to 256.

    Memory traffic decides. Forward, some 16 passes over the inner features are made for each place, and padding adds
    E * S places to N; each group copies the factors of its expert, which is 6R / S of such passes for each place. The
    sum is least at `sqrt(6 R N / 16 E)`.
    """
    best = round((3 * rank * num_choices / (8 * num_experts)) ** 0.5)
    return max(16, min(256, 1 << best.bit_length() >> 1))


@dataclass(frozen=True, eq=False)
class Groups:
    """Where each choice of each token stands.

    Attributes:
        token_P: The token at each place; 0 at padding, whose weight is 0.
        place_TK: The place of each choice.
        expert_G: The expert of each group.
        first_E: The first group of each expert; what is behind the last one's is padding too.
        order_G: 0 to G - 1.
        start_T: Where the choices of each token begin, K apart.
    """

    token_P: Tensor
    place_TK: Tensor
    expert_G: Tensor
    first_E: Tensor
    order_G: Tensor
    start_T: Tensor

    @classmethod
    def of(cls, ids_TK: Tensor, num_experts: int, rank: int) -> Groups:
        """Group chosen experts; at least one token.

        Args:
            ids_TK: Who is chosen; no expert twice by one token.
            num_experts: E.
            rank: R, for the size of a group.
        """
        T, K = ids_TK.shape
        S = group_size(T * K, num_experts, rank)
        # the sum over the experts of their choices over S, each rounded up, is at most this
        G = (T * K + num_experts * (S - 1)) // S
        number = torch.arange(max(T, G, num_experts), device=ids_TK.device)
        ids_N1 = ids_TK.reshape(-1, 1)
        # the how manieth choice of its expert each one is, from 1
        rank_NE = (ids_N1 == number[:num_experts]).cumsum(0)
        groups_E = (rank_NE[-1] + (S - 1)) // S
        last_E = groups_E.cumsum(0)
        first_E = last_E - groups_E
        place_TK = (torch.add(rank_NE, first_E, alpha=S).gather(1, ids_N1) - 1).view(T, K)
        token_P = place_TK.new_zeros(G * S)
        token_P[place_TK] = number[:T].unsqueeze(1)
        order_G, start_T = number[:G], torch.arange(0, T * K, K, device=ids_TK.device)
        return cls(token_P, place_TK, torch.searchsorted(last_E[:-1], order_G, right=True), first_E, order_G, start_T)

    @classmethod
    def dense(cls, num_tokens: int, num_experts: int, device: torch.device) -> Groups:
        """One group of all tokens for each expert."""
        token_T, order_E = torch.arange(num_tokens, device=device), torch.arange(num_experts, device=device)
        place_TE = token_T.unsqueeze(1) + order_E * num_tokens
        return cls(token_T.repeat(num_experts), place_TE, order_E, order_E, order_E, token_T * num_experts)

    def place_values(self, values_TK: Tensor) -> Tensor:
        """A value for each choice at its place, 0 at padding: [G, S, 1]."""
        values_P = values_TK.new_zeros(self.token_P.shape)
        values_P[self.place_TK] = values_TK
        return values_P.view(len(self.order_G), -1, 1)

    def gather(self, rows_TX: Tensor) -> Tensor:
        """The row of each place's token: a new [G, S, X]."""
        return rows_TX.index_select(0, self.token_P).view(len(self.order_G), -1, rows_TX.shape[1])

    def factors(self, stack_EXX: Tensor) -> Tensor:
        """The matrix of each group's expert: a new [G, X, X]."""
        return stack_EXX.index_select(0, self.expert_G)

    def combine(self, rows_GSX: Tensor, weights_TK: Tensor | None = None) -> Tensor:
        """For each token the sum of its choices' rows, weighted if there are weights: [T, X].

        The sum is fp32 inside; the weights of half-precision rows are given as the sum of two such numbers, since one
        would lose so many bits that equal rows under weights of sum one would not give that row again.
        """
        rows_PX = rows_GSX.flatten(0, 1)
        if weights_TK is None:
            return F.embedding_bag(self.place_TK.flatten(), rows_PX, self.start_T, mode="sum")
        T, K = weights_TK.shape
        if rows_PX.dtype.itemsize >= weights_TK.dtype.itemsize:
            place_N, weights_N = self.place_TK.flatten(), weights_TK.to(rows_PX.dtype).flatten()
            return F.embedding_bag(place_N, rows_PX, self.start_T, mode="sum", per_sample_weights=weights_N)
        high_low_T2K = rows_PX.new_empty(T, 2, K)
        high_low_T2K[:, 0] = weights_TK
        torch.sub(weights_TK, high_low_T2K[:, 0], out=high_low_T2K[:, 1])
        place_T2K = self.place_TK.unsqueeze(1).expand(T, 2, K).flatten(1)
        return F.embedding_bag(place_T2K, rows_PX, mode="sum", per_sample_weights=high_low_T2K.flatten(1))

    def sum_by_expert(self, parts_GXX: Tensor) -> Tensor:
        """For each expert the sum over its groups, in fp32 inside: [E, X, X]; 0 for one that nobody chose."""
        sums_EX = F.embedding_bag(self.order_G, parts_GXX.flatten(1), self.first_E, mode="sum")
        return sums_EX.view(-1, *parts_GXX.shape[1:])
