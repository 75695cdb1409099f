"""What a score is worth: majority floors, and whether two models differ by more than chance."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from eval.scoring.scores import Score, percent

FLOOR_MARK = "▼"
NOT_SHOWN = "within two standard errors, so no difference is shown."
FLOOR_NOTE = f"{FLOOR_MARK} not above the majority floor: no better than always giving the most frequent answer."


def majority_share(answers: Sequence[Hashable]) -> float:
    """Share of the most frequent of the right answers: what a model scores that always gives it."""
    (_, most), *_ = Counter(answers).most_common(1)
    return most / len(answers)


def is_at_floor(value: float, majority: float | None) -> bool:
    """Whether a score is no better than always giving the most frequent answer."""
    return majority is not None and value <= majority + 1e-9


def score_cell(score: Score, at_floor: bool) -> str:
    """A score with its standard error in percent, marked if it is at the floor."""
    return percent(score) + (f" {FLOOR_MARK}" if at_floor else "")


def floor_cell(majority: float | None) -> str:
    """The majority floor in percent."""
    return "-" if majority is None else f"{100 * majority:.1f}"


def is_shown(gap: Score) -> bool:
    """Whether a difference is more than two standard errors."""
    return abs(gap.value) > 2 * gap.stderr


def verdict(ours: str, theirs: str, gap: Score) -> str:
    """Whether two models differ by more than chance, in words.

    Args:
        ours: Name of a model.
        theirs: Name of the one that it is compared with.
        gap: Their difference on the mean of the tasks.
    """
    points = f"{percent(gap, sign=True)} points on the mean of the tasks"
    if not is_shown(gap):
        return f"{ours} against {theirs}: {points}; {NOT_SHOWN}"
    ahead = ours if gap.value > 0 else theirs
    return f"{ours} against {theirs}: {points}; {ahead} is ahead, in one training run each."
