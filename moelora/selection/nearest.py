"""One expert whole, or none."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import Init, Param, Site, register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection
from moelora.validation import check, check_bool


@register
@dataclass(frozen=True, kw_only=True)
class Nearest(Selection):
    """The expert of the highest score with weight 1; with `threshold` the base model alone where that score is low.

    Args:
        threshold: Whether each expert has a least score that it takes sequences from.
    """

    kind: ClassVar[str] = "nearest"

    threshold: bool = False

    def __post_init__(self) -> None:
        check_bool("selection.threshold", self.threshold)

    def check(self, config: Any) -> None:
        """Refuse a threshold with feed-forward blocks: the block is inside the experts, and with none it would be 0.

        Raises:
            ConfigError: With the reason.
        """
        check(
            not self.threshold or config.placement.kind == "linear",
            "selection.threshold",
            self.threshold,
            "False with the placement 'feed_forward'",
            "A token that no expert takes would lose the whole block.",
        )

    def params(self, site: Site) -> list[Param]:
        """`threshold` [E, 1] in fp32."""
        least = Param("threshold", (site.num_experts, 1), Init("zeros"), trainable=False, dtype=torch.float32)
        return [least] if self.threshold else []

    def new_rows(self, name: str, old: Tensor, count: int) -> Tensor | None:
        """The lowest of the old thresholds."""
        return old.min().expand(count, 1) if name == "threshold" else None

    def experts_per_token(self, num_experts: int) -> int:
        """1."""
        return 1

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    @property
    def is_by_sequence(self) -> bool:
        """Always."""
        return True

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        best_T1, ids_T1 = scored.scores_TE.max(-1, keepdim=True)
        weights_T1 = torch.ones_like(best_T1)
        if self.threshold:
            weights_T1 = (best_T1 >= given.tensors["threshold"].view(-1)[ids_T1]).float()
        assigned_T1 = weights_T1 > 0 if self.threshold else None
        return Routing(
            scored.logits_TE,
            scored.probs_TE,
            weights_T1,
            ids_T1,
            assigned_T1,
            sums_to_one=not self.threshold,
            separate=True,
        )
