"""A fixed threshold on the probability.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection, renormalize
from moelora.validation import check, is_real


@register
@dataclass(frozen=True, kw_only=True)
class Threshold(Selection):
    """Every token is sent to the experts whose probability is at least `threshold`: `w_e = p_e m_e / sum(p m)`.

    The baseline of AdaMoLE (arXiv 2405.00361).

    Args:
        threshold: None is 1 / E, which at least one expert always passes. With more a token may get no expert: a linear
            then gives the base's output, a feed-forward block 0.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "threshold"

    threshold: float | None = None

    def __post_init__(self) -> None:
        least = self.threshold
        check(least is None or (is_real(least) and 0 < least <= 1), "threshold", least, "0 < threshold <= 1, or None")

    def check(self, config: Any) -> None:
        """Refuse scores that are not probabilities.

        Raises:
            ConfigError: With the reason.
        """
        if not config.scores.is_distribution:
            raise ConfigError(
                f"selection 'threshold' compares probabilities, and {config.scores.describe()} are none; allowed: "
                "linear scores with activation='softmax' and no bias."
            )

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        scores_TE = scored.scores_TE
        passed_TE = scores_TE >= (1 / scores_TE.shape[-1] if self.threshold is None else self.threshold)
        if self.threshold is None:
            # equal scores may all be rounded below 1 / E; the best one passes
            passed_TE = passed_TE | (scores_TE == scores_TE.amax(-1, keepdim=True))
        weights_TE = renormalize(scores_TE * passed_TE)
        return Routing(scored.logits_TE, scored.probs_TE, weights_TE, ids_TK=None, assigned_TK=passed_TE)
