"""Scores that a table has for each task, learned at each site (Polytropon).

Shape suffixes: N sequences, E experts, G groups of experts, S experts of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored
from moelora.scores.task import LearnedScoresOfTasks
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class TaskTableScores(LearnedScoresOfTasks):
    """A row of numbers for each task, at each site, which divide a weight of 1 among the experts of a group.

        z_t = sigmoid(Z_t),   w_te = z_te / (sum over its group of z_t + 1e-12)

    In training z is drawn from a relaxed Bernoulli distribution of temperature 1 with the logits Z_t, once for each
    sequence and site (Polytropon, arXiv 2202.13914). The ids are the fact `task_ids` of a batch.

    Args:
        num_tasks: Number of tasks.
        groups: Number of groups that the experts are in, one after the other.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "task_table"

    groups: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_count(self.groups), "scores.groups", self.groups, "an integer of at least 1")

    def check(self, config: Any) -> None:
        """Refuse groups of different sizes.

        Raises:
            ConfigError: With both numbers.
        """
        E = config.experts.num_experts
        check(E % self.groups == 0 == config.experts.fewest - E, "scores.groups", self.groups, f"a divisor of {E}")

    @property
    def differs_by_site(self) -> bool:
        """Always: each site has its own table, and draws for itself."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`weight` [num_tasks, E], which starts at U(-1e-3, 1e-3)."""
        return [Param("weight", (self.num_tasks, site.num_experts), Init("uniform", 1e-3))]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`.

        Raises:
            ConfigError: For an id that is no task's.
        """
        ids_N = self.tasks_N(given.tokens)
        logits_NE = given.tensors["weight"].float()[ids_N]
        if given.training:
            # torch's RelaxedBernoulli(1, logits), whose checks of its arguments make the host wait for a device
            noise_NE = torch.rand_like(logits_NE).logit(eps=torch.finfo(torch.float32).eps)
            z_NE = (logits_NE + noise_NE).sigmoid()
        else:
            z_NE = logits_NE.sigmoid()
        z_NGS = z_NE.unflatten(-1, (self.groups, -1))
        scores_NE = (z_NGS / (z_NGS.sum(-1, keepdim=True) + 1e-12)).flatten(1)
        sequence_T = given.tokens.sequence_T()
        logits_TE, scores_TE = logits_NE[sequence_T], scores_NE[sequence_T]
        return Scored(logits_TE, scores_TE / self.groups, scores_TE, is_softmax=False)
