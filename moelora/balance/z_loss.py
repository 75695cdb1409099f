"""The router z-loss.

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
class ZLoss(Balance):
    """`mean_t logsumexp(z_t)^2` per layer (ST-MoE, arXiv 2202.08906, Eq. 5), then the mean over the layers that ran.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "z"
    coef_name: ClassVar[str] = "balance.z_loss_coef"
    logged_as: ClassVar[str] = "z_loss"

    def shares(self, totals: RoutingTotals) -> Mapping[Mixture, LayerLoss]:
        """See `Balance.shares`."""
        shares = 1 / totals.tokens_L.clamp_min(1) / totals.num_ran
        return {mixture: _share(share) for mixture, share in zip(totals.counts, shares, strict=True)}


def _share(share: Tensor) -> LayerLoss:
    def loss(routing: Routing, valid_T: Tensor) -> Tensor:
        squares_T = routing.logits_TE.logsumexp(-1).square() * valid_T
        return share.to(squares_T.device) * squares_T.sum()

    return loss
