"""The load-balancing loss of a tree of experts, per layer of the tree (S'MoRE).

Shape suffixes: T tokens, E edges, C chains of nodes, S children of a node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import RoutingTotals
from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.routing.record import LayerLoss, Mixture
from moelora.scores.tree import by_level, check_sizes, levels
from moelora.validation import check


@dataclass(frozen=True, kw_only=True)
class OfTree(Balance):
    """Base of the losses of a tree of experts.

    Args:
        sizes: The number of experts in each layer of the tree, leaves first.

    Raises:
        ConfigError: For no list of sizes.
    """

    sizes: list[int] = field(default_factory=lambda: [4, 4])

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "sizes", check_sizes("sizes", self.sizes))

    def check(self, config: Any) -> None:
        """Refuse another selection than that of the same tree.

        Raises:
            ConfigError: With the reason.
        """
        given = config.selection
        same = given.kind == "tree_top" and given.sizes == self.sizes
        check(same, "selection", given.describe(), f"'tree_top' of the sizes {self.sizes} with {self.kind!r} balance")


@register
@dataclass(frozen=True, kw_only=True)
class TreeSwitchBalance(OfTree):
    """`s_l * sum_n f_n P_n` of each layer l of the tree, the mean over its layers, then over the model's.

    f is the share of the choices in a layer of the tree that fell on expert n, whoever its parent; P its mean
    probability below the parents that were chosen. 1.0 at perfect balance.

    Args:
        coef: Coefficient of the loss. 0 switches it off.
        sizes: The number of experts in each layer of the tree, leaves first.

    Raises:
        ConfigError: For a negative coefficient, or no list of sizes.
    """

    kind: ClassVar[str] = "tree_switch"

    def shares(self, totals: RoutingTotals) -> Mapping[Mixture, LayerLoss]:
        """See `Balance.shares`."""
        return {
            mixture: self._share(counts_E, tokens.clamp_min(1) * totals.num_ran)
            for (mixture, counts_E), tokens in zip(totals.counts.items(), totals.tokens_L, strict=True)
        }

    def _share(self, counts_E: Tensor, over: Tensor) -> LayerLoss:
        factors = {}
        for layer, counts_1CS in by_level(counts_E.unsqueeze(0), self.sizes).items():
            counts_S = counts_1CS[0].sum(0)
            factors[layer] = counts_S / counts_S.sum().clamp_min(1e-9) * self.sizes[layer] / over / len(self.sizes)
        parents = sum(chains for _, chains, _ in levels(self.sizes))

        def loss(routing: Routing, valid_T: Tensor) -> Tensor:
            assert routing.assigned_TK is not None
            probs = by_level(routing.probs_TE * parents, self.sizes)
            chosen = by_level(routing.assigned_TK, self.sizes)
            total = routing.probs_TE.new_zeros(())
            for layer, factor_S in factors.items():
                active_TC1 = chosen[layer].any(-1, keepdim=True).float()
                below_TCS = probs[layer] * active_TC1 / active_TC1.sum(1, keepdim=True).clamp_min(1)
                sums_S = (below_TCS.sum(1) * valid_T.unsqueeze(-1)).sum(0)
                total = total + (factor_S.to(sums_S.device) * sums_S).sum()
            return total

        return loss
