"""The best children of each node of a tree (S'MoRE).

Shape suffixes: T tokens, C chains of nodes from the root, S children of a node, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.scores.tree import by_level, check_sizes, levels
from moelora.selection.base import Selection
from moelora.validation import check


@register
@dataclass(frozen=True, kw_only=True)
class TreeTop(Selection):
    """Of each chosen node the `fan_out` children of the largest scores, divided by their sum if they are several.

    With as many as there are the weights are the softmax itself (S'MoRE's "dense" gate). A child of a node that was not
    chosen has no weight.

    Args:
        sizes: The number of experts in each layer of the tree, leaves first.
        fan_out: f, how many children a node of the layer above has, leaves first.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "tree_top"

    sizes: list[int] = field(default_factory=lambda: [4, 4])
    fan_out: list[int] = field(default_factory=lambda: [2, 2])

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", check_sizes("sizes", self.sizes))
        object.__setattr__(self, "fan_out", check_sizes("fan_out", self.fan_out))
        fits = len(self.fan_out) == len(self.sizes) and all(
            f <= s for f, s in zip(self.fan_out, self.sizes, strict=False)
        )
        check(fits, "fan_out", self.fan_out, f"for each layer at most its number of experts ({self.sizes})")

    def check(self, config: Any) -> None:
        """Refuse other scores than those of the same tree.

        Raises:
            ConfigError: With the reason.
        """
        given = config.scores
        same = given.kind == "tree_keys" and given.sizes == self.sizes
        check(same, "scores", given.describe(), f"'tree_keys' of the sizes {self.sizes} with the selection 'tree_top'")

    @property
    def is_dense(self) -> bool:
        """Whether all children of all nodes are taken."""
        return self.fan_out == self.sizes

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        scores = by_level(scored.scores_TE, self.sizes)
        active_TC = torch.ones_like(scored.scores_TE[:, :1], dtype=torch.bool)
        weights, chosen = [], []
        for layer, _, children in levels(self.sizes):
            p_TCS, fan = scores[layer], self.fan_out[layer]
            if fan == children:
                w_TCS, on_TCS = p_TCS, torch.ones_like(p_TCS, dtype=torch.bool)
            else:
                best, ids = p_TCS.topk(fan, -1)
                best = best / best.sum(-1, keepdim=True) if fan > 1 else best
                w_TCS = torch.zeros_like(p_TCS).scatter(-1, ids, best)
                on_TCS = torch.zeros_like(p_TCS, dtype=torch.bool).scatter(-1, ids, True)
            on_TCS = on_TCS & active_TC.unsqueeze(-1)
            active_TC = on_TCS.flatten(1)
            weights.append((w_TCS * on_TCS).flatten(1))
            chosen.append(active_TC)
        return Routing(scored.logits_TE, scored.probs_TE, torch.cat(weights, 1), None, torch.cat(chosen, 1))
