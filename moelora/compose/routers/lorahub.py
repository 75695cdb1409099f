"""LoRAHub: a fixed mix whose weights are found on a few rows, without gradients."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.compose.routers.base import Composition, RouterRecipe, rows_with_answers
from moelora.compose.tokens import batches
from moelora.progress import track
from moelora.scores.constant import ConstantScores
from moelora.validation import check, is_count, is_real

_BATCH = 8


@register
@dataclass(frozen=True, kw_only=True)
class LoraHub(RouterRecipe):
    """LoRAHub (arXiv 2307.13269): one weight for each LoRA, found by trying, for a new task of which a few rows exist.

        minimise over w in [-bound, bound]^E:  loss(rows; sum_e w_e B_e A_e) + l1 * mean |w_e|

    The rows are those of all names together. Deviations: the search is a (1+1) evolution strategy with the 1/5 success
    rule, started at 0 (the paper leaves it to Nevergrad); products are mixed, not A and B each for itself.

    Args:
        steps: Weights that are tried.
        bound: The largest absolute weight.
        l1: Coefficient of the mean absolute weight.
        seed: Seed of the search.
    """

    kind: ClassVar[str] = "lorahub"
    reads_examples: ClassVar[bool] = True

    steps: int = 40
    bound: float = 1.5
    l1: float = 0.05
    seed: int = 0

    def __post_init__(self) -> None:
        check(is_count(self.steps), "router.steps", self.steps, "an integer of at least 1")
        check(is_real(self.bound) and self.bound > 0, "router.bound", self.bound, "a positive number")
        check(is_real(self.l1) and self.l1 >= 0, "router.l1", self.l1, "a number of at least 0")

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Constant scores, all experts."""
        return {
            "scores": {"kind": "constant", "weights": [0.0] * num_experts},
            "selection": "dense",
            "placement": {"kind": "linear", "routers": "per_model"},
        }

    def check_examples(self, names: Any, examples: Any) -> None:
        """Refuse no rows at all; for which expert they are does not matter.

        Raises:
            ComposeError: If there are none, or one has no answer.
        """
        rows_with_answers(self.kind, examples)

    @torch.no_grad()
    def fit(self, composition: Composition) -> None:
        """Search, and write the best weights into the configuration."""
        rows = rows_with_answers(self.kind, composition.examples)
        data = list(batches(rows, _BATCH, composition.model.device))

        def objective(weights: torch.Tensor) -> float:
            _use(composition, weights)
            losses = [float(composition.model(**batch).loss) for batch in data]
            return sum(losses) / len(losses) + self.l1 * float(weights.abs().mean())

        generator = torch.Generator().manual_seed(self.seed)
        best = torch.zeros(len(composition.names), dtype=torch.float64)
        lowest, sigma = objective(best), 0.5
        for _ in track(range(self.steps), "searching weights"):
            drawn = torch.randn(best.shape, generator=generator, dtype=best.dtype)
            tried = (best + sigma * drawn).clamp(-self.bound, self.bound)
            value = objective(tried)
            if value <= lowest:
                best, lowest, sigma = tried, value, sigma * 1.5
            else:
                sigma *= 1.5**-0.25
        _use(composition, best)


def _use(composition: Composition, weights: torch.Tensor) -> None:
    """Let the mixture have these weights, now and when it is saved."""
    config = composition.config
    assert isinstance(config.scores, ConstantScores)
    config.scores = replace(config.scores, weights=[float(weight) for weight in weights])
    for layer in composition.layers():
        layer.routers[composition.adapter].scores = config.scores
