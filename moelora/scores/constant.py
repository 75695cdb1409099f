"""Scores that are the same for every token: a fixed mix of the experts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from moelora.choices import register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check, is_real


@register
@dataclass(frozen=True, kw_only=True)
class ConstantScores(Scores):
    """Weights that are written in the configuration: a uniform mix, or one that was found (LoRAHub, arXiv 2307.13269).

    The products are mixed, `sum_e w_e B_e A_e`; LoRAHub's own code mixes A and B separately, which adds cross terms.

    Args:
        weights: One number for each expert; None is 1/E each.

    Raises:
        ConfigError: For something that is no list of numbers, or not one for each expert.
    """

    kind: ClassVar[str] = "constant"

    weights: list[float] | None = None

    def __post_init__(self) -> None:
        given = self.weights
        check(
            given is None or (isinstance(given, (list, tuple)) and all(map(is_real, given))),
            "scores.weights",
            given,
            "a finite number for each expert, or None",
        )
        if isinstance(given, tuple):
            object.__setattr__(self, "weights", list(given))

    def check(self, config: Any) -> None:
        """Refuse another number of weights than of experts.

        Raises:
            ConfigError: With both numbers.
        """
        E = config.experts.num_experts
        fits = self.weights is None or len(self.weights) == E == config.experts.fewest
        check(fits, "scores.weights", self.weights, f"{E} numbers, or None")

    @property
    def is_trained(self) -> bool:
        """Never."""
        return False

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`: each keeps its weight, the share of a uniform mix too."""
        weights = self._weights(num_experts)
        return replace(self, weights=[weights[e] for e in experts])

    def merged(self, groups: Sequence[Sequence[int]], num_experts: int) -> Self:
        """See `Choice.merged`: weights add up."""
        weights = self._weights(num_experts)
        return replace(self, weights=[sum(weights[e] for e in group) for group in groups])

    def _weights(self, num_experts: int) -> list[float]:
        return [1 / num_experts] * num_experts if self.weights is None else self.weights

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        E, T = given.num_experts, len(given.x_TD)
        weights_TE = torch.tensor(self._weights(E), dtype=torch.float32, device=given.x_TD.device).expand(T, E)
        # negative weights are no distribution; what a report shows of them is their size
        probs_TE = weights_TE.abs() / weights_TE.abs().sum(-1, keepdim=True).clamp_min(1e-9)
        return Scored(weights_TE, probs_TE, weights_TE, is_softmax=False)
