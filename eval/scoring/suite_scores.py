"""Let lm-eval score a model on a suite."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from eval.scoring.judging import majority_share
from eval.scoring.model_scores import TaskScores
from eval.suites.registry import Suite
from moelora.errors import RunError


def score_suite(
    scorer: Any, suite: Suite, limit: int | None = None
) -> tuple[dict[str, TaskScores], float, dict[str, Any]]:
    """Let lm-eval score a model.

    Args:
        scorer: An `lm_eval.api.model.LM`.
        suite: The tasks.
        limit: The first so many rows of each task; None for all.

    Returns:
        Scores by the tasks' labels, wall time in seconds, and an example of each task as it was put to the model.

    Raises:
        RunError: If tasks of a user's own YAML have no value for each row.
    """
    from lm_eval import simple_evaluate

    chat = uses_chat(scorer, suite)
    started = time.monotonic()
    with lean_lm_eval():
        found = simple_evaluate(
            model=scorer,
            tasks=list(suite.tasks.values()),
            task_manager=suite.manager,
            limit=limit,
            # The standard errors of means need no bootstrap; it would cost more than small models' scoring.
            bootstrap_iters=1000,
            apply_chat_template=chat,
            system_instruction=suite.system if chat else None,
        )
    seconds = time.monotonic() - started
    scores, examples = {}, {}
    for task in suite.tasks:
        samples = found["samples"][task]
        metric, label = suite.metric(task), suite.label(task)
        values = [sample.get(metric) for sample in samples if sample["filter"] == samples[0]["filter"]]
        if not all(isinstance(value, (int, float)) for value in values):
            raise RunError(
                f"task {task!r} has no number for each row in its metric {metric!r}; name one that has in its YAML: "
                "`metadata: {metric: acc}`."
            )
        digest = hashlib.sha256()
        for sample in samples:
            digest.update(f"{sample['doc_hash']} {sample['prompt_hash']} {sample['target_hash']}\n".encode())
        scores[label] = TaskScores(
            metric=metric,
            version=suite.version(task),
            rows=digest.hexdigest(),
            majority=_majority(suite.tasks[task], [sample["doc"] for sample in samples]),
            values=[float(value) for value in values],
            metrics=_metrics(found["results"][task]),
        )
        examples[label] = _example(samples[0])
    return scores, seconds, examples


@contextmanager
def lean_lm_eval() -> Iterator[None]:
    """lm-eval without what costs time or lines and is not used here.

    Its bars of making prompts take a second each: there is one bar, of the scoring. Its description of the machine runs
    pip for seconds: the receipt has what matters.
    """
    import lm_eval.api.model
    import lm_eval.api.task
    import lm_eval.evaluator

    def as_it_is(items: Any, *_: Any, **__: Any) -> Any:
        return items

    replaced = [
        (lm_eval.api.model, "tqdm", as_it_is),
        (lm_eval.api.task, "tqdm", as_it_is),
        (lm_eval.evaluator, "add_env_info", as_it_is),
    ]
    originals = [getattr(place, name) for place, name, _ in replaced]
    for place, name, ours in replaced:
        setattr(place, name, ours)
    try:
        yield
    finally:
        for (place, name, _), original in zip(replaced, originals, strict=True):
            setattr(place, name, original)


def uses_chat(scorer: Any, suite: Suite) -> bool:
    """Whether prompts become chats: where the suite wants it and the model has a template."""
    return suite.system is not None and bool(getattr(scorer.tokenizer, "chat_template", None))


def _metrics(results: Mapping[str, Any]) -> dict[str, dict[str, float | None]]:
    """lm-eval's `{"acc,none": ..., "acc_stderr,none": ...}` by metric."""
    found = {}
    for key, value in results.items():
        metric, comma, chosen = key.partition(",")
        if comma and not metric.endswith("_stderr"):
            stderr = results.get(f"{metric}_stderr,{chosen}")
            name = metric if chosen == "none" else key
            found[name] = {
                "value": float(value),
                "stderr": float(stderr) if isinstance(stderr, (int, float)) else None,
            }
    return found


def _majority(task: Any, rows: list[Any]) -> float | None:
    """Share of the most frequent answer among the rows; None where answers are free."""
    answers = [task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row) for row in rows]
    return majority_share(answers) if all(isinstance(answer, (int, str)) for answer in answers) else None


def _example(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the model saw it, and what it made of it."""
    arguments = sample["arguments"]
    return {
        "prompt": arguments[0][0],
        "choices": [argument[1] for argument in arguments] if isinstance(arguments[0][1], str) else None,
        "target": sample["target"],
        "responses": [response[0] for response in sample["resps"]],
    }
