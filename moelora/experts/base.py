"""The axis of experts: what one expert computes, and which tensors hold it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self

from moelora.choices import Choice
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors


@dataclass(frozen=True, kw_only=True)
class Experts(Choice):
    """Base of the choices of experts.

    Args:
        num_experts: Number of experts E of a mixture.
    """

    axis: ClassVar[str] = "experts"

    num_experts: int = 8

    def members(self) -> list[str]:
        """A phrase for each expert, where there is something to say of it by itself; else none."""
        return []

    @property
    def scaling(self) -> float:
        """The factor of an expert's low-rank product."""
        raise NotImplementedError

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`."""
        return replace(self.frozen(0), num_experts=len(experts))

    def factors(self, parts: Mapping[str, AdapterTensors], role: str, scaling: float) -> Factors | None:
        """The low-rank factors of all experts on the linear `role`, or None if it has no experts.

        Args:
            parts: The modules that hold the adapter's tensors at the site, by the first parts of the declared names.
            role: The linear.
            scaling: The factor to use, `self.scaling` unless it was changed with `set_scale`.
        """
        raise NotImplementedError
