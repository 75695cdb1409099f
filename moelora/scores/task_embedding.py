"""Scores of a task's embedding, the same at all sites (MOELoRA).

Shape suffixes: N sequences, E experts, D features of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored
from moelora.scores.linear import router_logits
from moelora.scores.task import LearnedScoresOfTasks
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class TaskEmbeddingScores(LearnedScoresOfTasks):
    """`p = softmax(W_g t)` with t the embedding of the sequence's task (MOELoRA, arXiv 2310.18339).

    The ids are the fact `task_ids` of a batch.

    Args:
        num_tasks: Number of tasks.
        features: D, the size of an embedding.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "task_embedding"

    features: int = 64

    def __post_init__(self) -> None:
        super().__post_init__()
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
    def is_distribution(self) -> bool:
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
        ids_N = self.tasks_N(given.tokens)
        logits_NE = router_logits(given.tensors["embedding"][ids_N], given.tensors["weight"])
        logits_TE = logits_NE[given.tokens.sequence_T()]
        scores_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, scores_TE, scores_TE, is_softmax=True)
