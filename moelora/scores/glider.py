"""Scores of a token at a site, mixed with those of its whole sequence: GLIDER.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored
from moelora.scores.centroids import CentroidScores
from moelora.scores.prototypes import standardized_logits
from moelora.validation import check, is_real


@register
@dataclass(frozen=True, kw_only=True)
class GliderScores(CentroidScores):
    """GLIDER (arXiv 2410.07172): a local score of the token, as PHATGOOSE's, and a global one of its sequence.

        z_e = std(v_e) . std(x) / sqrt(D) + alpha * cos(h - c_0, c_e - c_0),  softmax(z)

    The global part is that of `CentroidScores`, with its fields. Each site has copies of the centroids beside its own
    vectors v_e, since a router holds all that it reads: (E + 1) * features numbers in fp32 for a site, 4.4 MB for 8
    experts at the 210 linears of a model with 576 features.

    Args:
        alpha: Factor of the global score.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "glider"

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_real(self.alpha) and self.alpha >= 0, "scores.alpha", self.alpha, "a number of at least 0")

    @property
    def is_distribution(self) -> bool:
        """Always."""
        return True

    @property
    def ignores_input(self) -> bool:
        """Never: the local part reads it."""
        return False

    def params(self, site: Site) -> list[Param]:
        """`prototypes` [E, D], and those of `CentroidScores`."""
        shape = (site.num_experts, site.router_features)
        return [Param("prototypes", shape, Init("zeros"), trainable=False), *super().params(site)]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        local_TE = standardized_logits(given.x_TD, given.tensors["prototypes"])
        logits_TE = local_TE + self.alpha * self.cosines_TE(given)
        probs_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, probs_TE, probs_TE, is_softmax=True)
