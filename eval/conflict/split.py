"""Which rows train, which choose the learning rates, and which are scored."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moelora.errors import RunError
from moelora.runs.held_out import in_order_of_keys, prompt_key

# Of the rows that are held out, the share that chooses learning rates.
SELECTION_SHARE = 1 / 3
# A standard error wants a few rows, and a choice more than one.
LEAST = {"to choose learning rates": 2, "to score": 4, "to train": 4}


@dataclass(frozen=True)
class Split:
    """Rows by task; no prompt that is held out is trained on, in whichever task.

    Args:
        train: What is trained on.
        selection: What chooses the learning rates; one row for each prompt.
        scored: What the numbers are of; one row for each prompt.
        dropped: How many rows are in none of these, because their prompt is held out elsewhere.
    """

    train: dict[str, Any]
    selection: dict[str, Any]
    scored: dict[str, Any]
    dropped: int


def split_rows(rows: Any, held_out: float, seed: int) -> Split:
    """Hold out rows of each task.

    Prompts come in one random order for all tasks, so that tasks with the same prompts hold out the same ones.

    Args:
        rows: A `datasets.Dataset` with a column `task`.
        held_out: Share of each task's different prompts.
        seed: Of the order.

    Raises:
        RunError: If the rows do not say their task, there is one task only, or a task has too few rows.
    """
    by_task = _by_task(rows)
    keys = [prompt_key(row, seed) for row in rows]
    selection: dict[str, list[int]] = {}
    scored: dict[str, list[int]] = {}
    for task, indices in by_task.items():
        order = in_order_of_keys(indices, keys)
        held = round(held_out * len(order))
        chosen = round(SELECTION_SHARE * held)
        selection[task], scored[task] = order[:chosen], order[chosen:held]
    held_keys = {keys[index] for part in (selection, scored) for own in part.values() for index in own}
    train = {task: [index for index in own if keys[index] not in held_keys] for task, own in by_task.items()}
    _check_enough(by_task, train, selection, scored, held_out)
    used = sum(len(own) for part in (train, selection, scored) for own in part.values())
    train_rows, selection_rows, scored_rows = (
        {task: rows.select(own) for task, own in part.items()} for part in (train, selection, scored)
    )
    return Split(train_rows, selection_rows, scored_rows, dropped=len(keys) - used)


def _by_task(rows: Any) -> dict[str, list[int]]:
    if "task" not in rows.column_names:
        raise RunError("the rows do not say their task; allowed: a column `task` (`dataset.columns: {task: NAME}`).")
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(rows["task"]):
        if task is None or not str(task).strip():
            raise RunError(f"row {index + 1} of the shuffled rows has no task; allowed: a name in the column `task`.")
        by_task.setdefault(str(task), []).append(index)
    if len(by_task) < 2:
        raise RunError(
            f"all rows are of the task {next(iter(by_task))!r}; allowed: at least two tasks. One task needs no "
            "mixture by task; train a LoRA, and a mixture beside it if you are curious (`moelora train`)."
        )
    return dict(sorted(by_task.items()))


def _check_enough(
    by_task: Mapping[str, list[int]],
    train: Mapping[str, list[int]],
    selection: Mapping[str, list[int]],
    scored: Mapping[str, list[int]],
    held_out: float,
) -> None:
    wrong = []
    for task, own in by_task.items():
        found = dict(zip(LEAST, (len(selection[task]), len(scored[task]), len(train[task])), strict=True))
        if any(found[use] < least for use, least in LEAST.items()):
            wrong.append(f"{task!r} has {len(own)} rows: {', '.join(f'{n} {use}' for use, n in found.items())}")
    if wrong:
        raise RunError(
            f"too few rows at a held-out share of {held_out:g}: {'; '.join(wrong)}. Needed for each task: at least "
            f"{', '.join(f'{n} {use}' for use, n in LEAST.items())}, of different prompts. Add rows "
            "(dataset.rows_per_task, dataset.limit), drop the task, or change --held-out."
        )


def at_random(train: Mapping[str, Any], seed: int) -> list[Any]:
    """The training rows of all tasks, split at random into parts of the tasks' sizes.

    Args:
        train: Rows by task.
        seed: Of the order.
    """
    from datasets import concatenate_datasets

    rows = concatenate_datasets(list(train.values()))
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    parts, start = [], 0
    for own in train.values():
        parts.append(rows.select(order[start : start + len(own)]))
        start += len(own)
    return parts
