"""Experts that are LoRAs.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from moelora.choices import Init, Param, Site, register
from moelora.errors import TargetError
from moelora.experts.base import Experts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, check_bool, check_choice, is_count, is_index, is_positive, is_real, is_share

Initialisation = Literal["kaiming", "normal"]


@register
@dataclass(frozen=True, kw_only=True)
class LoraExperts(Experts):
    """An expert is a LoRA: `scaling * B A x`, with `scaling = lora_alpha / r` (`/ sqrt(r)` with `use_rslora`).

    Args:
        num_experts: Number of experts E of a mixture.
        r: Rank of **one** expert.
        lora_alpha: LoRA's alpha, for one expert.
        lora_dropout: Probability of dropping an element of the input of A, in training. The experts of a mixture share
            one draw (the papers' codes draw one each; the expectation is the same).
        use_rslora: Scale by `lora_alpha / sqrt(r)` (arXiv 2312.03732).
        init: How A starts: "kaiming" is `kaiming_uniform_(a=sqrt(5))` as in LoRA, "normal" is N(0, `init_std`). B is 0.
        init_std: Standard deviation of the "normal" initialisation.
        num_frozen: The first so many experts of a mixture are not trained, and no plain LoRA beside the mixtures is
            unless it is 0.
        per_layer: Numbers of experts of the layers, first layers first (MoLA, arXiv 2402.08562): one for each layer, or
            one for each of as many groups of equal size. None is `num_experts` everywhere, else that is the largest.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "lora"
    is_low_rank: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True
    has_stacks: ClassVar[bool] = True
    lora_name: ClassVar[str] = "LoRA"
    """What one expert is called in a table."""

    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    init: Initialisation = "kaiming"
    init_std: float = 0.02
    num_frozen: int = 0
    per_layer: list[int] | None = None

    def __post_init__(self) -> None:
        check(is_count(self.num_experts), "num_experts", self.num_experts, "an integer of at least 1")
        check(is_count(self.r), "r", self.r, "an integer of at least 1")
        check(is_positive(self.lora_alpha), "lora_alpha", self.lora_alpha, "a positive number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check_bool("use_rslora", self.use_rslora)
        check_choice("experts.init", self.init, Initialisation)
        check(is_real(self.init_std) and self.init_std > 0, "init_std", self.init_std, "a positive number")
        check(
            is_index(self.num_frozen) and self.num_frozen <= self.num_experts,
            "experts.num_frozen",
            self.num_frozen,
            f"0 to num_experts ({self.num_experts})",
        )
        counts = self.per_layer
        if counts is not None:
            good = isinstance(counts, (list, tuple)) and bool(counts) and all(map(is_count, counts))
            check(
                good and max(counts) == self.num_experts and self.num_frozen == 0,
                "experts.per_layer",
                counts,
                f"integers of at least 1, the largest num_experts ({self.num_experts}), none of them frozen; or None",
            )
            object.__setattr__(self, "per_layer", list(counts))

    @property
    def fewest(self) -> int:
        """See `Experts.fewest`."""
        return min(self.per_layer or [self.num_experts])

    def num_experts_at(self, member: int, num_members: int) -> int:
        """See `Experts.num_experts_at`."""
        if self.per_layer is None:
            return self.num_experts
        if num_members % len(self.per_layer):
            raise TargetError(
                f"experts.per_layer is {self.per_layer}, {len(self.per_layer)} numbers for {num_members} adapted "
                "layers; allowed: as many as layers, or a number that divides them into groups of equal size. Give "
                "another list, or leave layers out with layers_to_transform."
            )
        return self.per_layer[member * len(self.per_layer) // num_members]

    @property
    def scaling(self) -> float:
        """The factor of `B A x`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def site_phrase(self, num_experts: int, routed: bool = True, roles: Sequence[str] = ()) -> str:
        """See `Experts.site_phrase`."""
        if not routed:
            return f"plain {self.lora_name}"
        whole = "feed-forward " if roles else ""
        name = "" if roles and self.lora_name == "LoRA" else f"{self.lora_name} "
        at = f" ({', '.join(roles)})" if roles else ""
        return f"mixture of {self.counted(num_experts)} {whole}{name}experts{at}"

    def counted(self, num_stored: int) -> str:
        """The number of experts of a mixture, for a table.

        Args:
            num_stored: How many are stored.
        """
        return str(num_stored)

    def frozen(self, num_experts: int) -> Self:
        """See `Choice.frozen`."""
        return replace(self, num_frozen=num_experts)

    def params(self, site: Site) -> list[Param]:
        """A [E, R, D] and B [E, O, R] of each linear."""
        init, zeros, frozen = Init(self.init, self.init_std), Init("zeros"), self.num_frozen
        return [
            param
            for role, (in_features, out_features) in site.linears.items()
            for param in (
                Param(f"A.{role or 'weight'}", (self._num_a(site), self.r, in_features), init, num_frozen=frozen),
                Param(f"B.{role or 'weight'}", (site.num_experts, out_features, self.r), zeros, num_frozen=frozen),
            )
        ]

    def _num_a(self, site: Site) -> int:
        return site.num_experts

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The two stacks as they are."""
        name = role or "weight"
        if not parts["A"].has(name):
            return None
        return Factors(parts["A"].tensor(name), parts["B"].tensor(name), scaling)
