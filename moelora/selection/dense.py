"""Dense selection: all experts, weighted by their scores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection, renormalize
from moelora.validation import check_bool


@register
@dataclass(frozen=True, kw_only=True)
class Dense(Selection):
    """Every token is sent to all experts (soft merging, MoLoRA, arXiv 2309.05444).

    Args:
        renormalize: Whether the weights are divided by their sum; those of a softmax sum to one anyway.
    """

    kind: ClassVar[str] = "dense"

    renormalize: bool = False

    def __post_init__(self) -> None:
        check_bool("selection.renormalize", self.renormalize)

    @property
    def is_dense(self) -> bool:
        """Always."""
        return True

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        weights_TK = renormalize(scored.scores_TE) if self.renormalize else scored.scores_TE
        return Routing(
            scored.logits_TE,
            scored.probs_TE,
            weights_TK,
            ids_TK=None,
            sums_to_one=self.renormalize,
            tokens=given.tokens,
        )
