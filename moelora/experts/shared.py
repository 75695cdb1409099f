"""LoRA experts with shared ones beside them, which are always on.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from moelora.choices import Param, Site, register
from moelora.experts.lora import LoraExperts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class SharedLoraExperts(LoraExperts):
    """Shared LoRAs that every token passes with weight 1, and routed ones (DeepSeekMoE, arXiv 2401.06066, Eq. 9).

        y = W x + scaling (sum_s B_s A_s x + sum_e g_e(x) B_e A_e x)

    The router, its balance losses and the switching of experts know the routed ones alone.

    The fields are those of `LoraExperts`, where `num_experts` counts the routed ones, and:

    Args:
        num_shared: How many there are beside these. Their tensors stand before those of the routed ones.

    Deviations: an expert is a LoRA of a linear, not a feed-forward network; where all experts of a mixture are switched
    off, its shared ones are too.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "lora_with_shared"
    are_alike: ClassVar[bool] = False

    num_shared: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.num_shared), "experts.num_shared", self.num_shared, "an integer of at least 1")
        check(self.num_frozen == 0, "experts.num_frozen", self.num_frozen, "0 with shared experts")

    def check(self, config: Any) -> None:
        """Refuse feed-forward blocks: the block is in every expert, so that it would be counted once for each.

        Raises:
            ConfigError: With the reason.
        """
        super().check(config)
        check(
            config.placement.kind != "feed_forward",
            "placement",
            config.placement.kind,
            f"a placement on linears with {self.kind!r} experts",
            "The block is inside every expert, and weights that sum to more than one would scale it; take 'linear'.",
        )

    def counted(self, num_stored: int) -> str:
        """See `LoraExperts.counted`."""
        return f"{num_stored - self.num_shared} routed and {self.num_shared} shared"

    def _num_stored(self, site: Site) -> int:
        return site.num_experts + (self.num_shared if site.routed else 0)

    def params(self, site: Site) -> list[Param]:
        """As of `LoraExperts`, of the shared experts and then the routed ones."""
        return super().params(replace(site, num_experts=self._num_stored(site)))

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The two stacks, the first of which are always on."""
        found = super().factors(parts, role, scaling, site)
        if found is None or site is None or not site.routed:
            return found
        return replace(found, num_shared=self.num_shared)
