"""The load-balancing loss of Mixtral's and MixLoRA's code, pooled over the layers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.switch import prob_sums
from moelora.balance.totals import MixtureTotals
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing


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

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`.

        Raises:
            ConfigError: For layers of different numbers of experts.
        """
        model = totals.model
        sizes = sorted(set(model.mixtures.values()))
        if len(sizes) > 1:
            raise ConfigError(f"balance 'mixtral' pools the layers, but they have {sizes} experts; use 'switch'.")
        pooled_E = model.counts_ME.sum(0) * routing.num_experts / model.tokens_M.sum().clamp_min(1).square()
        return (pooled_E.to(valid_LT.device) * prob_sums(routing, valid_LT)).sum(-1)
