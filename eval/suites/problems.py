"""Problems of reasoning-gym as rows of lm-eval tasks, scored by reasoning-gym's own verifiers."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from moelora.runs.tasks import fresh_problems, task_data_set


def load(*, task: str, options: Mapping[str, Any], seed: int, size: int, **_: Any) -> Any:
    """Distinct problems of a task as its split `validation`; lm-eval calls it with the `dataset_kwargs` of a YAML.

    Args:
        task: Name of the reasoning-gym data set.
        options: Its options.
        seed: Seed of the problems.
        size: How many; fewer if the task does not have as many.
    """
    from datasets import Dataset, DatasetDict

    problems, _dropped = fresh_problems(task, options, seed=seed, size=size, seen=())
    verifier = json.dumps([task, dict(options)])
    rows = [
        {"prompt": problem.prompt, "answer": problem.answer, "entry": json.dumps(problem.entry), "verifier": verifier}
        for problem in problems
    ]
    return DatasetDict({"validation": Dataset.from_list(rows)})


def score(row: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """The verifier's score of an answer, and whether it is the full one."""
    found = float(_verifier(row["verifier"]).score_answer(results[0].strip(), json.loads(row["entry"])))
    return {"exact": float(found >= 1.0), "verifier_score": found}


@functools.cache
def _verifier(words: str) -> Any:
    task, options = json.loads(words)
    return task_data_set(task, options, seed=0, size=1)
