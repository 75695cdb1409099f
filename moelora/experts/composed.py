"""Experts that are LoRAs which exist already."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

from moelora.choices import register
from moelora.experts.lora import LoraExperts
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class ComposedLoraExperts(LoraExperts):
    """LoRAs that were trained apart, each an expert: `sum_e g_e B_e A_e x`, each B_e with its LoRA's scaling in it.

    All are stored with the largest rank `r`: what a smaller one lacks is rows of A and columns of B that are 0, which
    stay 0 when they are trained since each makes the gradient of the other. A LoRA that is not at a site is 0 there.

    The fields are those of `LoraExperts`, with `lora_alpha = r`, and:

    Args:
        names: What the experts are called, in their order.
        ranks: The rank that each had.
        sources: Where each came from: `{"source": ..., "license": ...}` as far as it is known.

    Raises:
        ConfigError: For a value out of range, or lists of another length than `num_experts`.
    """

    kind: ClassVar[str] = "lora_composed"

    names: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        E = self.num_experts
        for name, good, allowed in (
            ("names", lambda value: isinstance(value, str) and bool(value), "names"),
            ("ranks", lambda value: is_count(value) and value <= self.r, f"integers of 1 to r ({self.r})"),
            ("sources", lambda value: isinstance(value, dict), "dicts"),
        ):
            given = getattr(self, name)
            valid = isinstance(given, (list, tuple)) and (not given or (len(given) == E and all(map(good, given))))
            check(valid, f"experts.{name}", given, f"{E} {allowed}, one for each expert, or an empty list")
            object.__setattr__(self, name, list(given))
        check(len(set(self.names)) == len(self.names), "experts.names", self.names, "names that differ")
