"""The load-balancing loss of Switch Transformers, per layer.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import RoutingTotals
from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.routing.record import LayerLoss, Mixture


@register
@dataclass(frozen=True, kw_only=True)
class SwitchBalance(Balance):
    """`E * sum_e f_e P_e` per layer (Switch, arXiv 2101.03961, Eq. 4), then the mean over the layers that ran.

    f is the share of choices that fell on an expert (over all k choices, without gradient), P the mean router
    probability. 1.0 at perfect balance, E if everything goes to one expert.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "switch"

    def shares(self, totals: RoutingTotals) -> Mapping[Mixture, LayerLoss]:
        """See `Balance.shares`."""
        return {
            mixture: balance_share(
                counts_E / counts_E.sum().clamp_min(1e-9) * len(counts_E) / tokens.clamp_min(1) / totals.num_ran
            )
            for (mixture, counts_E), tokens in zip(totals.counts.items(), totals.tokens_L, strict=True)
        }


def balance_share(share_E: Tensor) -> LayerLoss:
    """`sum_e share_e sum_t P_te` over valid tokens."""

    def loss(routing: Routing, valid_T: Tensor) -> Tensor:
        prob_sums_E = (routing.probs_TE * valid_T.unsqueeze(-1)).sum(0)
        return (share_E.to(prob_sums_E.device) * prob_sums_E).sum()

    return loss
