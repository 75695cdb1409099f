"""The router z-loss.

Shape suffixes: L mixtures, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.choices import register
from moelora.routing.decision import Routing


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

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        squares_LT = routing.logits_TE.logsumexp(-1).square() * valid_LT
        return squares_LT.sum(-1) / totals.over_L
