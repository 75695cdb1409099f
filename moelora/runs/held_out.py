"""Rows that training never sees, so that what was learnt can be scored on them."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from moelora.errors import RunError


def prompt_key(row: Mapping[str, Any], seed: int) -> str:
    """A number for the prompt of a row, the same wherever the prompt comes again.

    Of a chat it is what comes before the first reply, since a longer chat may hold a shorter one; of a text all of it.

    Args:
        row: Has `prompt`, `messages` or `text`.
        seed: Another one gives other numbers.
    """
    prompt = next((row[name] for name in ("prompt", "messages", "text") if row.get(name)), None)
    if isinstance(prompt, list):
        prompt = list(itertools.takewhile(lambda message: message["role"] != "assistant", prompt)) or prompt
    return hashlib.sha256(json.dumps([seed, prompt], sort_keys=True, default=str).encode()).hexdigest()


def in_order_of_keys(indices: Iterable[int], keys: Sequence[str]) -> list[int]:
    """The first row of each different prompt, in the order of the prompts' numbers, which is random.

    Args:
        indices: The rows to look at.
        keys: The `prompt_key` of every row.
    """
    first: dict[str, int] = {}
    for index in indices:
        first.setdefault(keys[index], index)
    return [first[key] for key in sorted(first)]


def hold_out(rows: Any, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Which rows train and which are held out: of each task the same share of its different prompts.

    It depends on the prompts alone, not on the order of the rows. No prompt that is held out is trained on, in
    whichever task; where it has several rows, the first of a task is the one that is held out, and the others are in
    neither.

    Args:
        rows: A `datasets.Dataset`; it may have a column `task`.
        share: Between 0 and 1; at least one prompt is held out.
        seed: Of the choice.

    Returns:
        The numbers of the rows to train on, and of those held out.

    Raises:
        RunError: If a task has too few prompts for one to be trained on.
    """
    keys = [prompt_key(row, seed) for row in rows]
    tasks = list(map(str, rows["task"])) if "task" in rows.column_names else [""] * len(keys)
    by_task: dict[str, list[int]] = {}
    for index, task in enumerate(tasks):
        by_task.setdefault(task, []).append(index)
    held: list[int] = []
    for task, indices in sorted(by_task.items()):
        order = in_order_of_keys(indices, keys)
        count = max(1, round(share * len(order)))
        if count == len(order):
            whose = f"task {task!r} has" if task else "there are"
            raise RunError(
                f"dataset.held_out is {share:g}, and {whose} {len(order)} different prompts, so that none would be "
                "left to train on. Lower the share, add rows, or set it to 0."
            )
        held += order[:count]
    held_keys = {keys[index] for index in held}
    trained = [index for index, key in enumerate(keys) if key not in held_keys]
    lost = by_task.keys() - {tasks[index] for index in trained}
    if lost:
        raise RunError(
            f"dataset.held_out is {share:g}, and all prompts of task {min(lost)!r} are held out, some of them with "
            "another task, so that it has none to train on. Lower the share, add rows, or set it to 0."
        )
    return trained, sorted(held)
