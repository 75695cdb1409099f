"""Experts that are vectors which scale an activation ((IA)^3).

Shape suffixes: E experts, T tokens, H attention heads, F features of the activation.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, check_bool, is_count


@register
@dataclass(frozen=True, kw_only=True)
class VectorExperts(Experts):
    """An expert is a vector `l_e` that scales an activation `a`: `a * sum_e g_e(a) l_e` (MoV, arXiv 2309.05444).

    At the linear behind a feed-forward block's activation that is its input, elsewhere its output. The router looks at
    what is scaled, at the projections of keys and values at each head by itself.

    Args:
        num_experts: Number of vectors E.
        per_head: Whether the heads of keys and values are routed one by one, with one router for all of them.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "vector"

    num_experts: int = 10
    per_head: bool = True

    def __post_init__(self) -> None:
        check(is_count(self.num_experts), "num_experts", self.num_experts, "an integer of at least 1")
        check_bool("experts.per_head", self.per_head)

    def check(self, config: Any) -> None:
        """Refuse a placement with other modules than linears.

        Raises:
            ConfigError: With the reason.
        """
        kind = config.placement.kind
        check(
            kind in ("parts", "linear") and config.placement.unrouted_modules is None,
            "placement",
            config.placement.describe(),
            "'parts' or 'linear' without unrouted_modules, with 'vector' experts",
            "A vector scales the input or the output of one linear.",
        )

    def params(self, site: Site) -> list[Param]:
        """`L.weight` [E, F], which starts at 1."""
        return [Param("L.weight", (site.num_experts, _features(site)), Init("ones"))]

    def router_features(self, site: Site) -> int:
        """F, or those of one head."""
        return _features(site) // self._num_heads(site)

    def _num_heads(self, site: Site) -> int:
        of_heads = self.per_head and site.part in ("key", "value") and site.head_features > 0
        whole = of_heads and _features(site) % site.head_features == 0
        return _features(site) // site.head_features if whole else 1

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        l_EF = given.tensor("L.weight")
        if given.site.part == "down":
            return given.base(self._scaled(given, given.x, l_EF, 1))
        return self._scaled(given, given.base(given.x), l_EF, self._num_heads(given.site))

    def _scaled(self, given: ExpertInput, a: Tensor, l_EF: Tensor, H: int) -> Tensor:
        """The activation [..., F], scaled."""
        rows = a.reshape(*a.shape[:-2], -1, a.shape[-1] // H) if H > 1 else a
        gates = given.route(rows, repeats=H).gates_TE().view(-1, H, len(l_EF))
        scale = torch.einsum("the,ehf->thf", gates, l_EF.float().view(len(l_EF), H, -1))
        return (a * scale.reshape(a.shape)).to(a.dtype)


def _features(site: Site) -> int:
    (sizes,) = site.linears.values()
    return sizes[0] if site.part == "down" else sizes[1]
