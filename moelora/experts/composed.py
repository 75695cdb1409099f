"""Experts that are LoRAs which exist already."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Self

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
        sources: Where each came from: `{"source": ..., "license": ...}` as far as it is known, and "minus", the
            LoRAs that were subtracted from it. A source is a name on the Hub, or the last part of a local path.
        recipe: How the router was made when they were composed: the recipe's kind and words, `"rows"`, how many rows it
            was fitted on by the name of the expert, and `"data"`, the names of what they were read from.

    Raises:
        ConfigError: For a value out of range, or lists of another length than `num_experts`.
    """

    kind: ClassVar[str] = "lora_composed"

    names: list[str] = field(default_factory=list)
    ranks: list[int] = field(default_factory=list)
    sources: list[dict[str, Any]] = field(default_factory=list)
    recipe: dict[str, Any] = field(default_factory=dict)

    def members(self) -> list[str]:
        """Name, rank and origin of each LoRA."""
        ranks = self.ranks or [self.r] * len(self.names)
        sources = self.sources or [{}] * len(self.names)
        named = zip(self.names, ranks, sources, strict=True)
        return [", ".join((f"{name}: rank {rank}", *map(str, origin.values()))) for name, rank, origin in named]

    def describe(self) -> str:
        """As of every choice, but what `members` says."""
        return f"{self.kind}(num_experts={self.num_experts}, r={self.r}, num_frozen={self.num_frozen})"

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
        check(
            _is_recipe(self.recipe), "experts.recipe", self.recipe, "a dict; in it `rows` counts by name, `data` names"
        )
        check(len(set(self.names)) == len(self.names), "experts.names", self.names, "names that differ")

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`; the name of one that comes again gets a number."""
        names: list[str] = []
        for e in experts if self.names else ():
            again = (f"{self.names[e]}-{n}" for n in range(2, len(experts) + len(self.names) + 2))
            names.append(next(name for name in (self.names[e], *again) if name not in names))
        return self._of(
            len(experts),
            names,
            [self.ranks[e] for e in experts if self.ranks],
            [self.sources[e] for e in experts if self.sources],
        )

    def merged(self, groups: Sequence[Sequence[int]], num_experts: int) -> Self:
        """See `Choice.merged`; names are joined, and what is known of the sources is kept."""
        return self._of(
            len(groups),
            ["+".join(self.names[e] for e in group) for group in groups if self.names],
            [min(self.r, sum(self.ranks[e] for e in group)) for group in groups if self.ranks],
            [
                self.sources[group[0]] if len(group) == 1 else {"merged": [self.sources[e] for e in group]}
                for group in groups
                if self.sources
            ],
        )

    def _of(self, count: int, names: list[str], ranks: list[int], sources: list[dict[str, Any]]) -> Self:
        return replace(self, num_experts=count, num_frozen=0, names=names, ranks=ranks, sources=sources)


def _is_recipe(value: Any) -> bool:
    rows, data = (value.get("rows", {}), value.get("data", [])) if isinstance(value, dict) else (None, None)
    counts = isinstance(rows, dict) and all(map(is_count, rows.values()))
    return counts and isinstance(data, (list, tuple)) and all(isinstance(name, str) for name in data)
