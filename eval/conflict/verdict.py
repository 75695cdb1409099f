"""From losses to a verdict, by plain arithmetic."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist, fmean
from typing import Any, Literal

from eval.scoring.scores import Score, macro

# How many standard errors away a mean has to be to count as seen.
ERRORS = 2.0
# Own LoRAs transfer if another task's brings this share of what the task's own brings, on average.
TRANSFERS = 0.5

Kind = Literal["lora", "mixture", "separate", "undecided"]
TITLES: dict[Kind, str] = {
    "lora": "a LoRA is enough",
    "mixture": "a mixture can help",
    "separate": "keep separate LoRAs and compose",
    "undecided": "not decidable",
}


@dataclass(frozen=True)
class Verdict:
    """What the numbers say.

    Args:
        kind: Which verdict.
        text: One sentence.
        reasons: Sentences with the numbers behind it.
        more_rows: If more rows can decide it, about how many more have to be scored in all.
    """

    kind: Kind
    text: str
    reasons: list[str]
    more_rows: int | None = None

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return dataclasses.asdict(self)


def transfer_share(base: Mapping[str, float], losses: Mapping[str, Mapping[str, float]]) -> float | None:
    """What LoRAs of other tasks bring, as a share of what the task's own brings.

    Args:
        base: The base model's loss by task.
        losses: The loss of task i's LoRA on task j's rows, by i and j.

    Returns:
        The mean gain of foreign LoRAs over the mean gain of own ones; None where own ones gain nothing.
    """
    own = fmean(base[task] - losses[task][task] for task in base)
    if own <= 0:
        return None
    return fmean(base[task] - losses[other][task] for task in base for other in base if other != task) / own


def errors_for_one_of(tasks: int) -> float:
    """How many standard errors a single task needs, so that chance lifts one of them no more often than a mean."""
    normal = NormalDist()
    return -normal.inv_cdf(normal.cdf(-ERRORS) / tasks)


def decide(headroom: Mapping[str, Score], shared_gain: float, transfer: float | None, margin: float) -> Verdict:
    """The verdict.

    Args:
        headroom: Loss of the shared LoRA minus that of the own LoRA, by task.
        shared_gain: Loss of the base model minus that of the shared LoRA, mean over tasks.
        transfer: See `transfer_share`.
        margin: Headroom in nats that is worth having.
    """
    mean = macro(list(headroom.values()))
    errors = errors_for_one_of(len(headroom))
    gaining = [task for task, each in headroom.items() if each.value > margin and each.value > errors * each.stderr]
    moves = transfer is not None and transfer >= TRANSFERS
    about_mean = (
        f"Headroom, the mean of {len(headroom)} tasks: {mean.value:+.3f} ± {mean.stderr:.3f} nats. {margin:g} nats "
        f"count as worth having, {ERRORS:g} standard errors as seen."
    )
    about_tasks = (
        f"Tasks that gain by a LoRA of their own: {', '.join(gaining) or 'none'} (more than {margin:g} nats and "
        f"{errors:.1f} standard errors, as {len(headroom)} tasks are looked at)."
    )
    if transfer is None:
        about_transfer = (
            "Own LoRAs are no better than the base model: they were trained too little or at a wrong learning rate, so "
            "that headroom by them is worth nothing and nothing can be said of their transfer."
        )
    else:
        about_transfer = (
            f"A LoRA of another task brings {transfer:.0%} of what a task's own brings "
            f"({TRANSFERS:.0%} or more: they transfer)."
        )
    reasons = [about_mean, about_tasks, about_transfer]
    gains = bool(gaining) or (mean.value > margin and mean.value > ERRORS * mean.stderr)
    is_below = mean.value + ERRORS * mean.stderr <= margin
    # what is as bad as the base, or worse, leaves headroom to LoRAs that have learned nothing, or has none by chance
    if shared_gain <= 0:
        worthless = "the shared LoRA is" if transfer is not None else "neither the shared LoRA nor own ones are"
        no = "no " if transfer is not None else ""
        return Verdict("undecided", f"Not decidable: {worthless} {no}better than the base model.", reasons)
    if transfer is None and (gains or not is_below):
        return Verdict("undecided", "Not decidable: own LoRAs are no better than the base model.", reasons)
    if len(gaining) == len(headroom) and not moves:
        return Verdict("separate", "Keep separate LoRAs and compose: every task gains by its own.", reasons)
    if gains:
        if len(gaining) == len(headroom):
            why = "every task gains by its own LoRA, and the LoRAs help other tasks too"
        elif gaining:
            why = f"{len(gaining)} of {len(headroom)} tasks gain by LoRAs of their own, the others are not shown to"
        else:
            why = "the tasks gain by LoRAs of their own on the mean, no single one for sure"
        return Verdict("mixture", f"A mixture can help: {why}.", reasons)
    if is_below:
        helps = mean.value + ERRORS * mean.stderr < 0
        why = "the tasks help each other" if helps else f"LoRAs by task gain less than {margin:g} nats"
        return Verdict("lora", f"A LoRA is enough: {why}.", reasons)
    more = rows_needed(mean, margin) - mean.n
    return Verdict(
        "undecided", f"Not decidable with n = {mean.n}: needs about {more:,} more rows to score.", reasons, more
    )


def rows_needed(mean: Score, margin: float) -> int:
    """About how many rows in all make the mean's standard error small enough, if the mean stays where it is.

    Where the mean is nearly the margin no number of rows would do; half a margin is then taken for the distance.
    """
    distance = mean.value if mean.value > margin else max(margin - mean.value, margin / 2)
    return max(math.ceil(mean.n * (ERRORS * mean.stderr / distance) ** 2), mean.n + 1)
