"""Scores that are given: the task of a sequence is the number of its expert."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.batch import Tokens
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.validation import check, is_count

BASE = -1
"""The task id of a sequence that stays with the base model."""

_WHOLE = "allowed: one whole number for each sequence"


def task_numbers(tokens: Tokens, least: int, most: int, allowed: str) -> Tensor:
    """The task id of each sequence, [N].

    Args:
        tokens: What the batch says.
        least, most: The smallest and the largest id.
        allowed: What these are, for the error.

    Raises:
        ConfigError: If the batch has no task ids, or one that is no such number. On an accelerator, where reading them
            would wait for it, a number that is none stops the device with an assertion that says the same.
    """
    ids_N = tokens.fact_N("task_ids")
    if ids_N.dtype == torch.bool or ids_N.dim() != 1:
        raise ConfigError(f"task_ids are {ids_N.tolist()}; {_WHOLE}.")
    # floats that are whole numbers come from columns and from torch.zeros; 0.7 is no number of a task
    _require((ids_N == ids_N.round()).all(), ids_N, _WHOLE)
    ids_N = ids_N.long()
    _require(((ids_N >= least) & (ids_N <= most)).all(), ids_N, f"allowed: {allowed}")
    return ids_N


def _require(holds: Tensor, ids_N: Tensor, allowed: str) -> None:
    """Refuse task ids, on an accelerator without waiting for it, and in a compiled graph without leaving it."""
    if holds.device.type != "cpu" or torch.compiler.is_compiling():
        torch._assert_async(holds, f"task_ids are out of range; {allowed}.")
    elif not holds:
        raise ConfigError(f"task_ids are {ids_N.tolist()}; {allowed}.")


@dataclass(frozen=True, kw_only=True)
class ScoresOfTasks(Scores):
    """Base of the scores that look at a sequence's task alone; the ids are the fact `task_ids` of a batch."""

    @property
    def needs(self) -> frozenset[str]:
        """The task ids."""
        return frozenset({"task_ids"})

    @property
    def ignores_input(self) -> bool:
        """Always."""
        return True


@dataclass(frozen=True, kw_only=True)
class LearnedScoresOfTasks(ScoresOfTasks):
    """Base of those that are learned for each task.

    Args:
        num_tasks: Number of tasks.

    Raises:
        ConfigError: For a value out of range.
    """

    num_tasks: int = 8

    def __post_init__(self) -> None:
        check(is_count(self.num_tasks), "num_tasks", self.num_tasks, "an integer of at least 1")

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    def tasks_N(self, tokens: Tokens) -> Tensor:
        """The task of each sequence.

        Raises:
            ConfigError: If the batch has no task ids, or one that is no task's.
        """
        return task_numbers(tokens, 0, self.num_tasks - 1, f"0 to {self.num_tasks - 1}, the tasks")


@register
@dataclass(frozen=True, kw_only=True)
class TaskScores(ScoresOfTasks):
    """1 for the expert whose number is the sequence's task id, 0 for the others; an id of -1 stays with the base.

    The ids are the fact `task_ids` of a batch, one for each sequence.
    """

    kind: ClassVar[str] = "task"

    @property
    def is_trained(self) -> bool:
        """Never."""
        return False

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`.

        Raises:
            ConfigError: For an id that is no expert's.
        """
        E = given.num_experts
        ids_N = task_numbers(given.tokens, BASE, E - 1, f"0 to {E - 1}, the experts, and {BASE}, the base")
        hot_NE = F.one_hot(ids_N + 1, E + 1)[:, 1:].float()
        hot_TE = hot_NE[given.tokens.sequence_T()]
        return Scored(hot_TE, hot_TE, hot_TE, is_softmax=False)
