"""Naive references of balance losses that are beside those of `moelora.ops.reference`, of the same kind.

Shape suffixes: T tokens, N sequences, E experts.
"""

from __future__ import annotations

from torch import Tensor


def localized_balance_loss(
    probs_TE: Tensor, sequence_T: Tensor, first_N: Tensor, valid_T: Tensor, delta: float
) -> Tensor:
    """LoRAMoE's `CV^2(I * Q)` (arXiv 2312.09979): what each sequence gives to each expert, weighted by its task.

    Args:
        probs_TE: Router probabilities.
        sequence_T: The sequence of each token.
        first_N: Whether a sequence's task is one of the first half of the experts.
        valid_T: True where a token counts.
        delta: See `LocalizedBalance`.
    """
    E = probs_TE.shape[1]
    zero = probs_TE.new_zeros(())
    values: list[Tensor] = []
    for n in range(len(first_N)):
        tokens = [t for t in range(len(valid_T)) if valid_T[t] and sequence_T[t] == n]
        for e in range(E):
            importance = 1 + delta if bool(first_N[n]) == (e < E / 2) else 1 - delta
            values += [importance * sum((probs_TE[t, e] for t in tokens), start=zero)] if tokens else []
    mean = sum(values, start=zero) / len(values)
    squares = [(value - mean) ** 2 for value in values]
    return sum(squares, start=zero) / (len(values) - 1) / (mean**2 + 1e-10)
