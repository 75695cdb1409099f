"""The entropy of the router's probabilities, as a loss.

Shape suffixes: L mixtures, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.validation import check


@register
@dataclass(frozen=True, kw_only=True)
class EntropyLoss(Balance):
    """`mean_t sum_e -p_te log p_te` per layer, then the mean over the layers that ran (arXiv 2403.07652).

    That paper's "dynamic loss", which goes with top-p selection: a router of low entropy takes fewer experts. It stands
    beside a load-balancing loss, which keeps all tokens from going to the same few; the paper has 1e-4 for this one and
    1e-2 for that. log E where a router knows nothing.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "entropy"
    coef_name: ClassVar[str] = "balance.entropy_coef"
    logged_as: ClassVar[str] = "entropy_loss"

    def check(self, config: Any) -> None:
        """Refuse scores that are not probabilities.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.scores.is_distribution,
            "scores",
            config.scores.describe(),
            "scores that are probabilities (a softmax, no bias) with 'entropy' balance",
        )

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        probs = routing.probs_TE
        entropy_LT = -(probs * probs.clamp_min(1e-30).log()).sum(-1) * valid_LT  # 0 log 0 is 0
        return entropy_LT.sum(-1) / totals.over_L
