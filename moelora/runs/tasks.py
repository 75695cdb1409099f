"""Rows made by reasoning-gym: problems with answers, and the verifier that goes with each."""

from __future__ import annotations

import importlib.util
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moelora.errors import RunError
from moelora.validation import check_keys


@dataclass(frozen=True)
class Problem:
    """A problem of a task.

    Args:
        task: Name of the reasoning-gym data set.
        prompt: The question.
        answer: The reference answer.
        entry: What reasoning-gym's verifier wants beside a model's answer.
    """

    task: str
    prompt: str
    answer: str
    entry: dict[str, Any]


def task_data_set(task: str, options: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """A reasoning-gym data set.

    Raises:
        MoeLoraError: If reasoning-gym is not installed, has no such task, or refuses an option.
    """
    if importlib.util.find_spec("reasoning_gym") is None:
        raise RunError(f"task {task!r} is made by reasoning-gym, which is not installed: pip install reasoning-gym.")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    check_keys("dataset.tasks", [task], DATASETS)
    config_class = DATASETS[task][1]
    allowed = set(config_class.__dataclass_fields__) - {"seed", "size"}
    check_keys(f"dataset.tasks.{task}", options, allowed)
    try:
        return reasoning_gym.create_dataset(task, seed=seed, size=size, **options)
    except (AssertionError, ValueError, TypeError) as error:  # reasoning-gym checks its options with assert
        raise RunError(f"dataset.tasks.{task}: reasoning-gym refuses the options {dict(options)}: {error}") from error


def problems(task: str, options: Mapping[str, Any], *, seed: int, size: int) -> Iterator[Problem]:
    """Up to `size` problems; the same for the same arguments.

    reasoning-gym makes problem i from the seed `seed + i`: two seeds nearer than `size` give the same problems.
    """
    for entry in task_data_set(task, options, seed=seed, size=size):
        yield Problem(task=task, prompt=entry["question"].strip(), answer=str(entry["answer"]), entry=entry)


def fresh_problems(
    task: str, options: Mapping[str, Any], *, seed: int, size: int, seen: Collection[str]
) -> tuple[list[Problem], int]:
    """Distinct problems whose prompts are not among `seen`.

    Args:
        task: Name of the data set.
        options: Its options.
        seed: Its seed.
        size: How many to return; fewer if a task does not have as many.
        seen: Prompts to leave out, such as those of the training rows.

    Returns:
        The problems, and how many were dropped because their prompts are in `seen`.
    """
    fresh: dict[str, Problem] = {}
    dropped = 0
    # A task of few possible problems repeats itself; ten times the wish is enough to know that it has no more.
    for problem in problems(task, options, seed=seed, size=10 * size):
        if problem.prompt in seen:
            dropped += 1
        else:
            fresh.setdefault(problem.prompt, problem)
        if len(fresh) == size:
            break
    return list(fresh.values()), dropped


class Verifier:
    """reasoning-gym's verifier of a task's answers.

    Args:
        task: Name of the data set.
        options: Its options.
    """

    def __init__(self, task: str, options: Mapping[str, Any]) -> None:
        self.task = task
        self._data = task_data_set(task, options, seed=0, size=1)

    def score(self, problem: Problem, answer: str) -> float:
        """How right an answer is, from 0 to 1."""
        return float(self._data.score_answer(answer.strip(), problem.entry))
