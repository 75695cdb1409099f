"""Recipes without anything to fit: a uniform mix, a given task, a router that is trained afterwards."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import register
from moelora.compose.routers.base import RouterRecipe, check_top_k, top_k_of


@register
@dataclass(frozen=True, kw_only=True)
class Uniform(RouterRecipe):
    """The mean of all experts for every token: `sum_e (1/E) B_e A_e x`."""

    kind: ClassVar[str] = "uniform"

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Constant scores, all experts."""
        return {
            "scores": "constant",
            "selection": "dense",
            "placement": {"kind": "linear", "routers": "per_model"},
        }


@register
@dataclass(frozen=True, kw_only=True)
class Task(RouterRecipe):
    """The expert that the caller names with `task_ids`, its number or -1 for the base, for each sequence."""

    kind: ClassVar[str] = "task"

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Scores of the task, one expert."""
        return {
            "scores": "task",
            "selection": "dense",
            "placement": {"kind": "linear", "routers": "per_model"},
        }


@register
@dataclass(frozen=True, kw_only=True)
class TopK(RouterRecipe):
    """A linear router on each linear, to be trained over the experts: `moelora train` does.

    Args:
        top_k: Experts of a token; None is 2, or all where there are fewer.
        init_std: Its weights start at N(0, `init_std`).
    """

    kind: ClassVar[str] = "topk"

    top_k: int | None = None
    init_std: float = 0.02

    def __post_init__(self) -> None:
        check_top_k(self.top_k)

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Linear scores, the top k of them, renormalised.

        Raises:
            ComposeError: If `top_k` is above the number of experts.
        """
        k = top_k_of(self.kind, self.top_k, 2, num_experts)
        return {
            "scores": {"kind": "linear", "init_std": self.init_std},
            "selection": {"kind": "top_k", "k": k, "renormalize": k > 1},
        }
