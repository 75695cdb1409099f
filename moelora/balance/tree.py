"""The load-balancing loss of a tree of experts, per layer of the tree (S'MoRE).

Shape suffixes: L mixtures, T tokens, E edges, C chains of nodes, S children of a node.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.choices import register
from moelora.routing.decision import Routing
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

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        assert routing.assigned_TK is not None
        parents = sum(chains for _, chains, _ in levels(self.sizes))
        counts = by_level(totals.counts_LE.unsqueeze(-2), self.sizes)
        probs, chosen = (by_level(each, self.sizes) for each in (routing.probs_TE * parents, routing.assigned_TK))
        terms = []
        for layer, counts_L1CS in counts.items():
            counts_LS = counts_L1CS.sum((-3, -2))
            share_LS = counts_LS / counts_LS.sum(-1, keepdim=True).clamp_min(1e-9) * self.sizes[layer]
            active_LTC1 = chosen[layer].any(-1, keepdim=True).float()
            below_LTCS = probs[layer] * active_LTC1 / active_LTC1.sum(-2, keepdim=True).clamp_min(1)
            sums_LS = (below_LTCS.sum(-2) * valid_LT.unsqueeze(-1)).sum(-2)
            terms.append((share_LS * sums_LS).sum(-1))
        return torch.stack(terms).mean(0) / totals.over_L
