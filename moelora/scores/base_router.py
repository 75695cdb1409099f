"""Scores that the base model's own router gives.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check


@register
@dataclass(frozen=True, kw_only=True)
class BaseRouterScores(Scores):
    """The weights with which the wrapped block's own router sends a token to its experts, else 0 (PERFT-E)."""

    kind: ClassVar[str] = "base_router"
    reads_base_router: ClassVar[bool] = True

    def check(self, config: Any) -> None:
        """Refuse a placement without such a router, and another decision than the base's.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.placement.wraps_moe_blocks,
            "placement",
            config.placement.describe(),
            "'moe_block' with 'base_router' scores",
            "Only there is a router of the base model.",
        )
        check(
            config.selection.is_dense and not getattr(config.selection, "renormalize", False),
            "selection",
            config.selection.describe(),
            "'dense' with 'base_router' scores",
            "The base's router has chosen already.",
        )

    def check_site(self, site: Site) -> None:
        """See `Choice.check_site`."""
        check(
            site.num_experts == site.base_experts,
            "num_experts",
            site.num_experts,
            f"{site.base_experts}, the experts of the base's own mixture at {site.name!r}",
        )

    @property
    def is_trained(self) -> bool:
        """Never: the base is frozen."""
        return False

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        assert given.prepared is not None
        logits_TE, weights_TE = given.prepared.unbind(1)
        return Scored(logits_TE, logits_TE.softmax(-1), weights_TE, is_softmax=False)
