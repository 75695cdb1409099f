"""Scores of one model on a suite, as a JSON file with everything that is needed to compare it with others."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.scoring.judging import is_at_floor
from eval.scoring.scores import Score, macro, mean
from moelora.errors import RunError
from moelora.files import write_atomically

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
        return is_at_floor(self.score.value, self.majority)


@dataclass(frozen=True)
class ModelScores:
    """Scores of a model on a suite.

    Args:
        name: What tables call it.
        suite: Name of the suite.
        protocol: How it was scored.
        chat: Whether prompts were put into the model's chat template.
        limit: Rows per task that were asked for; None for all.
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
                f"{str(file)!r} is not a result of `moelora eval --suite` ({type(error).__name__}: {error})."
            ) from error


def _pack(values: list[float]) -> str | list[float]:
    """Zeros and ones as a text: a list of a thousand lines says no more."""
    return "".join(str(int(value)) for value in values) if set(values) <= {0.0, 1.0} else values


def _unpack(values: str | list[float]) -> list[float]:
    return [float(value) for value in values]
