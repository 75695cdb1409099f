"""The load-balancing loss of Mixtral's and MixLoRA's code, pooled over the layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from moelora.balance.base import Balance
from moelora.balance.switch import balance_share
from moelora.balance.totals import RoutingTotals
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.record import LayerLoss, Mixture


@register
@dataclass(frozen=True, kw_only=True)
class MixtralBalance(Balance):
    """Tokens of all layers together, `E * sum_ke f_ke P_e`; k at perfect balance.

    Args:
        coef: Coefficient of the loss, in this convention. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "mixtral"

    def shares(self, totals: RoutingTotals) -> Mapping[Mixture, LayerLoss]:
        """See `Balance.shares`.

        Raises:
            ConfigError: For layers of different numbers of experts.
        """
        sizes = sorted({len(counts_E) for counts_E in totals.counts.values()})
        if len(sizes) > 1:
            raise ConfigError(f"balance 'mixtral' pools the layers, but they have {sizes} experts; use 'switch'.")
        tokens = totals.tokens_L.sum().clamp_min(1)
        pooled_E = torch.stack(list(totals.counts.values())).sum(0) / tokens
        return dict.fromkeys(totals.counts, balance_share(pooled_E * len(pooled_E) / tokens))
