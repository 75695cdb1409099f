"""The load-balancing loss of Switch Transformers, per layer.

Shape suffixes: L mixtures, T tokens, E experts.
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

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        counts_LE = totals.counts_LE
        share_LE = counts_LE / counts_LE.sum(-1, keepdim=True).clamp_min(1e-9) * routing.num_experts
        return (share_LE * prob_sums(routing, valid_LT)).sum(-1) / totals.over_L


def prob_sums(routing: Routing, valid_LT: Tensor) -> Tensor:
    """`sum_t P_te` over valid tokens [L, E]."""
    return (routing.probs_TE * valid_LT.unsqueeze(-1)).sum(-2)
