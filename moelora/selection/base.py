"""The axis of selection: who is chosen, with what weight.

Shape suffixes: B sequences, S tokens of a sequence, T tokens, D input features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelora.choices import Choice
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored


@dataclass(frozen=True, kw_only=True)
class Selection(Choice):
    """Base of the choices of selection."""

    axis: ClassVar[str] = "selection"
    chooses_by_rank: ClassVar[bool] = False
    """Whether it takes the highest of the scores, so that a bias may choose without weighing, `Scored.bias_E`."""
    needs_all: ClassVar[bool] = False
    """Whether it selects among all experts or not at all, so that none can be switched off."""

    def experts_per_token(self, num_experts: int) -> int:
        """How many experts a token is sent to at most.

        Args:
            num_experts: E.
        """
        return num_experts

    @property
    def is_dense(self) -> bool:
        """Whether every token is sent to all experts, so that there is no load to balance."""
        return False

    @property
    def reads_batch(self) -> bool:
        """Whether a token's choice depends on the batch it is in: its padding, its sequences, its other tokens."""
        return False

    @property
    def ignores_input(self) -> bool:
        """Whether it decides by the scores alone, without draws."""
        return False

    @property
    def is_by_sequence(self) -> bool:
        """Whether one expert, or none, takes a whole sequence, by what its prompt is: the load is then the data's."""
        return False

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """Decide for each token.

        Args:
            scored: The scores.
            given: The rest.
        """
        raise NotImplementedError


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
    return weights_TK / sum_T1.masked_fill(sum_T1.abs() < 1e-9, 1e-9)


def renormalize_beside_null(weights_TK: Tensor, null_TK: Tensor) -> Tensor:
    """Divide by the sum over the experts that are not null, whose own weights become 0 (AdaMoE, arXiv 2406.13233).

    A token that chose null experts alone has theirs divided by their sum.
    """
    real_TK = weights_TK.masked_fill(null_TK, 0.0)
    has_real_T1 = real_TK.sum(-1, keepdim=True).abs() >= 1e-9
    return renormalize(torch.where(has_real_T1, real_TK, weights_TK))
