"""Scores with their standard errors, alone and in pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Score:
    """A mean.

    Args:
        value: The mean.
        stderr: Its standard error.
        n: Number of problems.
    """

    value: float
    stderr: float
    n: int


def card_row(task: str, metric: str, model: str, score: Score) -> dict[str, Any]:
    """A score as `moelora push --metrics` reads it for a model card."""
    return {
        "task": task,
        "metric": metric,
        "model": model,
        "value": round(score.value, 6),
        "stderr": round(score.stderr, 6),
        "n": score.n,
    }


def percent(score: Score, sign: bool = False) -> str:
    """A score with its standard error, in percent."""
    return f"{100 * score.value:{'+' if sign else ''}.1f} ± {100 * score.stderr:.1f}"


def mean(values: Sequence[float]) -> Score:
    """The mean of one value per problem, with the standard error of the sample."""
    n = len(values)
    spread = statistics.stdev(values) if n > 1 else 0.0
    return Score(value=sum(values) / n, stderr=spread / math.sqrt(n), n=n)


def difference(ours: Sequence[float], theirs: Sequence[float]) -> Score:
    """The mean difference on the same problems; pairing removes what the two have in common."""
    return mean([a - b for a, b in zip(ours, theirs, strict=True)])


def macro(scores: Sequence[Score]) -> Score:
    """The unweighted mean over tasks, whose errors are independent."""
    k = len(scores)
    return Score(
        value=sum(score.value for score in scores) / k,
        stderr=math.sqrt(sum(score.stderr**2 for score in scores)) / k,
        n=sum(score.n for score in scores),
    )
