"""Scores of a task's embedding, the same at all sites (MOELoRA).

Shape suffixes: N sequences, E experts, D features of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import router_logits
from moelora.scores.task import task_numbers
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class TaskEmbeddingScores(Scores):
    """`p = softmax(W_g t)` with t the embedding of the sequence's task (MOELoRA, arXiv 2310.18339).

    The ids are the fact `task_ids` of a batch.

    Args:
        num_tasks: Number of tasks.
        features: D, the size of an embedding.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "task_embedding"

    num_tasks: int = 8
    features: int = 64

    def __post_init__(self) -> None:
        check(is_count(self.num_tasks), "num_tasks", self.num_tasks, "an integer of at least 1")
        check(is_count(self.features), "task_features", self.features, "an integer of at least 1")

    def check(self, config: Any) -> None:
        """Refuse a router for each site: the decision is one for the whole model.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.placement.routers == "per_model",
            "placement.routers",
            config.placement.routers,
            "'per_model' with 'task_embedding' scores",
            "A task has one embedding and one gate.",
        )

    @property
    def needs(self) -> frozenset[str]:
        """The task ids."""
        return frozenset({"task_ids"})

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    @property
    def is_distribution(self) -> bool:
        """Always."""
        return True

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`embedding` [num_tasks, D] as `nn.Embedding` starts, and `weight` [E, D] as `nn.Linear` does."""
        return [
            Param("embedding", (self.num_tasks, self.features), Init("normal", 1.0)),
            Param("weight", (site.num_experts, self.features), Init("kaiming")),
        ]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`.

        Raises:
            ConfigError: For an id that is no task's.
        """
        ids_N = task_numbers(given.tokens, 0, self.num_tasks - 1, f"0 to {self.num_tasks - 1}, the tasks")
        logits_NE = router_logits(given.tensors["embedding"][ids_N], given.tensors["weight"])
        logits_TE = logits_NE[given.tokens.sequence_T()]
        scores_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, scores_TE, scores_TE, is_softmax=True)
