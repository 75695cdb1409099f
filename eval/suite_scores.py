"""Scores of one model on a suite, as a JSON file with everything that is needed to compare it with others."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.scores import Score, is_at_floor, macro, mean
from eval.suites.registry import Suite
from train.errors import RunError

FORMAT = 1


@dataclass(frozen=True)
class TaskScores:
    """Scores of a model on a task.

    Args:
        metric: The metric that tables show.
        version: That of the task's definition.
        rows: SHA-256 of the scored rows and prompts: two models have been asked the same if it is the same.
        majority: What a model scores that always gives the most frequent answer; None where answers are free.
        values: The metric's value for each row.
        metrics: All metrics of the task with their standard errors.
    """

    metric: str
    version: str
    rows: str
    majority: float | None
    values: list[float]
    metrics: dict[str, dict[str, float | None]]

    @property
    def score(self) -> Score:
        """The metric's mean over the rows, with its standard error."""
        return mean(self.values)

    @property
    def at_floor(self) -> bool:
        """Whether the score is no better than always giving the most frequent answer."""
        return is_at_floor(self.score, self.majority)


@dataclass(frozen=True)
class ModelScores:
    """Scores of a model on a suite.

    Args:
        name: What tables call it.
        suite: Name of the suite.
        protocol: How it was scored.
        chat: Whether prompts were put into the model's chat template.
        limit: Rows a task that were asked for; None for all.
        tasks: Label of a task to its scores.
        parameters: `trainable`, `active` and `base`.
        seconds: Wall time of scoring.
        tokens: Tokens of prompts and answers.
        kind: The adapter's preset, "lora" for PEFT's, "base" for none.
        adapter: Its folder or its name on the Hub.
        receipt: See `eval.receipt`.
        extra: What a caller adds.
    """

    name: str
    suite: str
    protocol: str
    chat: bool
    limit: int | None
    tasks: dict[str, TaskScores]
    parameters: dict[str, int]
    seconds: float
    tokens: int
    kind: str = "base"
    adapter: str | None = None
    receipt: dict[str, Any] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def macro(self) -> Score:
        """The unweighted mean over the tasks."""
        return macro([task.score for task in self.tasks.values()])

    def write(self, file: Path) -> Path:
        """Write it; the file is there whole or not at all."""
        content = {"format": FORMAT, **dataclasses.asdict(self)}
        for task in content["tasks"].values():
            task["values"] = _pack(task["values"])
        write_atomically(file, json.dumps(content, indent=1) + "\n")
        return file

    @classmethod
    def read(cls, file: Path) -> ModelScores:
        """Read what `write` wrote.

        Raises:
            RunError: If it is not such a file.
        """
        try:
            content = json.loads(file.read_text())
            if content.pop("format") != FORMAT:
                raise KeyError("format")
            tasks = {
                label: TaskScores(**{**task, "values": _unpack(task["values"])})
                for label, task in content.pop("tasks").items()
            }
            return cls(tasks=tasks, **content)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise RunError(
                f"{str(file)!r} is not a result of `python -m eval --suite` ({type(error).__name__}: {error})."
            ) from error


def _pack(values: list[float]) -> str | list[float]:
    """Zeros and ones as a text: a list of a thousand lines says no more."""
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else values


def _unpack(values: str | list[float]) -> list[float]:
    return [float(value) for value in values]


def write_atomically(file: Path, text: str) -> None:
    """Write a file so that a reader, or the next run after a kill, never sees half of it."""
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "w") as handle:
            handle.write(text)
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes files that only their owner reads
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


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
    """Share of the most frequent answer among the rows."""
    answers = [task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row) for row in rows]
    if not all(isinstance(answer, (int, str)) for answer in answers):
        return None
    (_, most), *_ = Counter(answers).most_common(1)
    return most / len(answers)


def _example(sample: Mapping[str, Any]) -> dict[str, Any]:
    """A row as the model saw it, and what it made of it."""
    arguments = sample["arguments"]
    return {
        "prompt": arguments[0][0],
        "choices": [argument[1] for argument in arguments] if isinstance(arguments[0][1], str) else None,
        "target": sample["target"],
        "responses": [response[0] for response in sample["resps"]],
    }
