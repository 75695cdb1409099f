"""The best children of each node of a tree (S'MoRE).

Shape suffixes: T tokens, C chains of nodes from the root, S children of a node, E edges.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.scores.tree import NoisyScored, by_level, check_sizes, levels
from moelora.selection.base import Selection
from moelora.validation import check, check_bool


@dataclass(frozen=True, eq=False, kw_only=True)
class NoisyTreeRouting(Routing):
    """A decision that noise had a part in.

    Attributes:
        chance_TE: How likely each edge of a chosen node would be chosen again if its own noise were drawn anew.
    """

    chance_TE: Tensor

    def sums_2E(self, valid_T: Tensor) -> Tensor:
        """See `Routing.sums_2E`; the load is the sum of the chances, which has a gradient."""
        each_2TE = torch.stack([self.gates_TE(), self.chance_TE], -3)
        return (each_2TE * valid_T.unsqueeze(-2).unsqueeze(-1)).sum(-2)


@register
@dataclass(frozen=True, kw_only=True)
class TreeTop(Selection):
    """Of each chosen node the `fan_out` children of the largest scores, divided by their sum if they are several.

    With as many as there are the weights are the softmax itself (S'MoRE's "dense" gate). A child of a node that was not
    chosen has no weight.

    Args:
        sizes: The number of experts in each layer of the tree, leaves first.
        fan_out: f, how many children a node of the layer above has, leaves first.
        raw_single: Whether the weight of a single child is its logit, not its probability (S'MoRE's "noisy_topk").

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "tree_top"
    needs_all: ClassVar[bool] = True

    sizes: list[int] = field(default_factory=lambda: [4, 4])
    fan_out: list[int] = field(default_factory=lambda: [2, 2])
    raw_single: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", check_sizes("sizes", self.sizes))
        object.__setattr__(self, "fan_out", check_sizes("fan_out", self.fan_out))
        fits = len(self.fan_out) == len(self.sizes) and all(
            f <= s for f, s in zip(self.fan_out, self.sizes, strict=False)
        )
        check(fits, "fan_out", self.fan_out, f"for each layer at most its number of experts ({self.sizes})")
        check_bool("selection.raw_single", self.raw_single)

    def check(self, config: Any) -> None:
        """Refuse other scores than those of the same tree.

        Raises:
            ConfigError: With the reason.
        """
        given = config.scores
        same = given.kind == "tree_keys" and given.sizes == self.sizes
        check(same, "scores", given.describe(), f"'tree_keys' of the sizes {self.sizes} with the selection 'tree_top'")
        chooses = all(fan < size for fan, size in zip(self.fan_out, self.sizes, strict=True))
        check(
            chooses or not given.noise,
            "fan_out",
            self.fan_out,
            f"for each layer fewer than its number of experts ({self.sizes}) with noisy scores",
            "Noise would choose nothing where all children are taken.",
        )

    @property
    def is_dense(self) -> bool:
        """Whether all children of all nodes are taken."""
        return self.fan_out == self.sizes

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        scores = by_level(scored.scores_TE, self.sizes)
        active_TC = torch.ones_like(scored.scores_TE[:, :1], dtype=torch.bool)
        logits = by_level(scored.logits_TE, self.sizes)
        weights, chosen, chances = [], [], []
        for layer, _, children in levels(self.sizes):
            p_TCS, fan = scores[layer], self.fan_out[layer]
            if fan == children:
                w_TCS, on_TCS = p_TCS, torch.ones_like(p_TCS, dtype=torch.bool)
            else:
                best, ids = p_TCS.topk(fan, -1)
                if fan > 1:
                    best = best / best.sum(-1, keepdim=True)
                elif self.raw_single:
                    best = logits[layer].gather(-1, ids)
                w_TCS = torch.zeros_like(p_TCS).scatter(-1, ids, best)
                on_TCS = torch.zeros_like(p_TCS, dtype=torch.bool).scatter(-1, ids, True)
            if isinstance(scored, NoisyScored):
                clean_TCS, spread_TCS = (by_level(x, self.sizes)[layer] for x in (scored.clean_TE, scored.spread_TE))
                chance_TCS = chance_of_top(clean_TCS, logits[layer], spread_TCS, fan)
                chances.append((chance_TCS * active_TC.unsqueeze(-1)).flatten(1))
            on_TCS = on_TCS & active_TC.unsqueeze(-1)
            active_TC = on_TCS.flatten(1)
            weights.append((w_TCS * on_TCS).flatten(1))
            chosen.append(active_TC)
        weights_TE, chosen_TE = torch.cat(weights, 1), torch.cat(chosen, 1)
        if not chances:
            return Routing(scored.logits_TE, scored.probs_TE, weights_TE, None, chosen_TE)
        return NoisyTreeRouting(
            scored.logits_TE, scored.probs_TE, weights_TE, None, chosen_TE, chance_TE=torch.cat(chances, 1)
        )


def chance_of_top(clean: Tensor, noisy: Tensor, spread: Tensor, k: int) -> Tensor:
    """How likely each is among the `k` largest if its own noise is drawn anew (arXiv 1701.06538, Eq. 8 and 9).

    Args:
        clean, noisy: Logits without and with the noise [..., S], S more than `k`.
        spread: The standard deviation of the noise.
        k: How many are chosen.
    """
    top = noisy.topk(k + 1, -1).values
    inside, outside = top[..., k : k + 1], top[..., k - 1 : k]
    threshold = torch.where(noisy > inside, inside, outside)
    return torch.special.ndtr((clean - threshold) / spread)
