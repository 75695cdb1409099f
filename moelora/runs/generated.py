"""Rows of reasoning-gym's tasks, in the form that a recipe trains on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from moelora.errors import RunError
from moelora.runs.config import DatasetConfig
from moelora.runs.tasks import Problem, Verifier, problems


def generated_rows(config: DatasetConfig, form: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of `config.tasks`.

    Pairs and rated answers need wrong answers, see `wrong_answer`. Every second rated answer is wrong. A text with a
    label is a problem with the name of its task.

    Args:
        config: The tasks.
        form: The columns of a row beside `task`.

    Raises:
        RunError: If a wrong answer is needed, and all problems of a task have the same one.
    """
    for task, options in (config.tasks or {}).items():
        found = list(problems(task, options, seed=config.seed, size=config.rows_per_task))
        verifier = Verifier(task, options)
        for index, problem in enumerate(found):
            words: dict[str, Any] = {"prompt": problem.prompt, "completion": problem.answer, "answer": problem.answer}
            words |= {"text": problem.prompt, "label": task}
            if "rejected" in form:
                words |= {"chosen": problem.answer, "rejected": wrong_answer(verifier, found, index)}
            if {"completion", "label"} <= set(form):
                words["label"] = index % 2 == 0
                if not words["label"]:
                    words["completion"] = wrong_answer(verifier, found, index)
            yield {**{column: words[column] for column in form}, "task": task}


def wrong_answer(verifier: Verifier, found: Sequence[Problem], index: int) -> str:
    """A wrong answer to a problem: what its task says ("rejected" in the metadata), else an answer to another problem.

    Args:
        verifier: Of the task.
        found: Problems of the task.
        index: Which of them it is for; the next one whose answer the verifier refuses here gives its own.

    Raises:
        RunError: If the task says none, and all of the problems have the same answer.
    """
    said = (found[index].entry.get("metadata") or {}).get("rejected")
    if said is not None:
        return str(said)
    for other in [*found[index + 1 :], *found[:index]]:
        if verifier.score(found[index], other.answer) < 1:
            return other.answer
    raise RunError(
        f"dataset.tasks.{verifier.task}: a wrong answer is needed, and the answers to all {len(found)} problems are "
        "right for each; give the task options with more variety, or raise dataset.rows_per_task."
    )
