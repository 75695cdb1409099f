"""LoRA experts of unlike ranks.

Shape suffixes: E experts, R the largest rank, M the sum of the ranks, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.experts.lora import LoraExperts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class RankedLoraExperts(LoraExperts):
    """LoRAs of a rank each: small experts for what is easy and large ones for what is not.

    After heterogeneous mixtures of experts (HMoE, arXiv 2408.10681), whose experts are feed-forward networks of unlike
    widths; that they are LoRAs of unlike ranks is ours. All have the scaling of `r`.

    The fields are those of `LoraExperts`, and:

    Args:
        ranks: The rank of each expert, at most `r`.

    Raises:
        ConfigError: For a value out of range, or a list of another length than `num_experts`.
    """

    kind: ClassVar[str] = "lora_ranks"
    has_stacks: ClassVar[bool] = False
    are_alike: ClassVar[bool] = False

    ranks: list[int] = field(default_factory=lambda: [2, 2, 4, 4, 8, 8, 16, 16])

    def __post_init__(self) -> None:
        super().__post_init__()
        good = isinstance(self.ranks, (list, tuple)) and all(is_count(rank) and rank <= self.r for rank in self.ranks)
        check(
            good and len(self.ranks) == self.num_experts,
            "experts.ranks",
            self.ranks,
            f"{self.num_experts} integers of 1 to r ({self.r}), one for each expert",
        )
        object.__setattr__(self, "ranks", list(self.ranks))
        check(self.num_frozen == 0, "experts.num_frozen", self.num_frozen, "0 with ranks")
        check(self.per_layer is None, "experts.per_layer", self.per_layer, "None with ranks")

    def check(self, config: Any) -> None:
        """Refuse plain LoRAs beside the mixtures, whose tensors would look like experts of unlike ranks.

        Raises:
            ConfigError: With the reason.
        """
        super().check(config)
        given = config.placement.unrouted_modules
        check(given is None, "placement.unrouted_modules", given, f"None with {self.kind!r} experts")

    def params(self, site: Site) -> list[Param]:
        """A [M, D] and B [M, O] of each linear: the rows of the first expert, then those of the second, and so on."""
        M = sum(self.ranks)
        return [
            param
            for role, (in_features, out_features) in site.linears.items()
            for param in (
                Param(f"A.{role or 'weight'}", (M, in_features), Init(self.init, self.init_std)),
                Param(f"B.{role or 'weight'}", (M, out_features), Init("zeros")),
            )
        ]

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The two stacks, with zeros where an expert has less than the largest rank."""
        name = role or "weight"
        if not parts["A"].has(name):
            return None
        a_ERD, b_ERO = (self._stacked(parts[part].tensor(name)) for part in ("A", "B"))
        return Factors(a_ERD, b_ERO.transpose(1, 2), scaling)

    def _stacked(self, rows: Tensor) -> Tensor:
        R = max(self.ranks)
        return torch.stack([F.pad(own, (0, 0, 0, R - len(own))) for own in rows.split(self.ranks)])
