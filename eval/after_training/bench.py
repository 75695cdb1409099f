"""What every row is measured with: the base in fp32, the adapters, fresh problems, and sizes.

Shape suffixes: B sequences, S tokens of a sequence, V words, T valid tokens, E experts.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from eval.after_training.adapters import rows_of_task
from eval.scoring.own_tasks import TaskResult, make_problems, solved, training_row
from moelora.compose import mean_loss
from moelora.compose.tokens import batches, tokenize
from moelora.runs.config import RunConfig
from moelora.runs.models import ModelSource, load_adapter, load_model, load_tokenizer

FIT_ROWS = 8
"""Training rows of each task that routers are fitted on."""
PROBE_ROWS = 3
"""Fresh problems of each task whose logits are compared."""
EXACT = 1e-5
"""How far apart logits of one function may be, as a share of the largest: what fp32 rounds in tens of layers."""
_BATCH = 8

Batch = dict[str, Tensor]
Found = TypeVar("Found")


@dataclass(frozen=True)
class Size:
    """What is stored of an adapter or a model: numbers and bytes of its files of weights."""

    parameters: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table.

    Attributes:
        verb: What was done.
        on: To what.
        compared: What the number is.
        value: The number.
        limit: What it may be at most, or, with `at_least`, at least.
        at_least: Which.
        before, after: Sizes.
        seconds: Of the verb alone, without the measuring.
        aside: Other numbers to read it by, by name.
    """

    verb: str
    on: str
    compared: str
    value: float
    limit: float
    at_least: bool = False
    before: Size | None = None
    after: Size | None = None
    seconds: float | None = None
    aside: Mapping[str, float] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether it keeps its limit; NaN never does."""
        return self.value >= self.limit if self.at_least else self.value <= self.limit


@dataclass(eq=False)
class Bench:
    """The adapters and what they are measured on.

    Attributes:
        config: The run of the mixture.
        tokenizer: The base's.
        base: The base model in fp32; it has no adapter between the measurements.
        work: An empty folder for what the verbs write.
        mixture: Folder of the mixture.
        loras: Folders of the LoRAs by task.
        problems: Fresh problems, none of which is a training row.
        fit: Tokenised training rows by task.
        tests: The fresh problems with their answers, tokenised, by task.
        base_loss: Loss of the base model alone on them.
        scores: Exact answers by model and task, as they are found.
    """

    config: RunConfig
    tokenizer: Any
    base: Any
    work: Path
    mixture: Path
    loras: dict[str, Path]
    problems: list[TaskResult]
    fit: dict[str, list[dict[str, list[int]]]]
    tests: dict[str, list[dict[str, list[int]]]]
    base_loss: float = float("nan")
    scores: dict[str, dict[str, float]] = field(default_factory=dict)

    @classmethod
    def open(cls, config: RunConfig, work: Path, mixture: Path, loras: dict[str, Path], limit: int) -> Bench:
        """Load the base and make the problems.

        Args:
            config: The run of the mixture.
            work: As the attribute.
            mixture: As the attribute.
            loras: As the attribute.
            limit: Fresh problems of each task.
        """
        tokenizer = load_tokenizer(config)
        problems = make_problems(config, tokenizer, limit)
        fit = {
            task: tokenize(rows_of_task(config, task, tokenizer).select(range(FIT_ROWS)), tokenizer) for task in loras
        }
        tests = {
            result.task: tokenize([training_row(problem, config, tokenizer) for problem in result.problems], tokenizer)
            for result in problems
        }
        base = load_model(ModelSource(config.model, "float32", config.model_kwargs)).eval()
        bench = cls(config, tokenizer, base, work, mixture, loras, problems, fit, tests)
        bench.base_loss = bench.loss(base)
        return bench

    @property
    def names(self) -> list[str]:
        """The tasks, in the order of the experts."""
        return list(self.loras)

    @contextmanager
    def adapted(self, folder: str | Path) -> Iterator[Any]:
        """The base with an adapter, all in fp32."""
        model = load_adapter(self.base, str(folder)).float().eval()
        try:
            yield model
        finally:
            model.unload()

    def probe(self, task: str) -> Batch:
        """A few fresh problems of a task as one batch."""
        return next(batches(self.tests[task][:PROBE_ROWS], PROBE_ROWS, self.base.device))

    def batches(self) -> list[Batch]:
        """All fresh problems with their answers."""
        rows = [row for rows in self.tests.values() for row in rows]
        return list(batches(rows, _BATCH, self.base.device))

    def fit_batches(self) -> list[Batch]:
        """The rows that routers are fitted on, tasks mixed."""
        rows = [row for of_tasks in zip(*self.fit.values(), strict=True) for row in of_tasks]
        return list(batches(rows, _BATCH, self.base.device))

    def loss(self, model: Any) -> float:
        """Mean loss of an answer's token on all fresh problems."""
        return mean_loss(model, self.batches())

    def logits(self, model: Any, tasks: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Logits [T, V] of the probes by task."""
        return {task: logits_of(model, self.probe(task)) for task in tasks or self.names}

    def exact(self, model: Any, tasks: Sequence[str] | None = None) -> dict[str, float]:
        """Share of the fresh problems that a model's greedy answers solve, by task."""
        found = {}
        for result in self.problems:
            if tasks is not None and result.task not in tasks:
                continue
            values = solved(model, self.tokenizer, result, self.config, batch_size=len(result.prompts))
            found[result.task] = sum(values) / len(values)
        return found


@torch.no_grad()
def logits_of(model: Any, batch: Batch) -> Tensor:
    """Logits [T, V] of the valid tokens of a batch."""
    return model(**batch).logits[batch["attention_mask"] > 0]


def furthest(first: Mapping[str, Tensor], second: Mapping[str, Tensor]) -> float:
    """The largest difference of two logits."""
    return max(float((first[task] - second[task]).abs().max()) for task in first)


def exact_limit(logits: Mapping[str, Tensor]) -> float:
    """How far from these the logits of the same function may be."""
    return EXACT * max(float(each.abs().max()) for each in logits.values())


def size_of(*folders: Path) -> Size:
    """The weights in folders, all together."""
    found = Size(0, 0)
    for folder in folders:
        for file in sorted(folder.iterdir()):
            parameters = _numbers(file)
            if parameters:
                found = Size(found.parameters + parameters, found.bytes + file.stat().st_size)
    return found


def _numbers(file: Path) -> int:
    if file.suffix == ".bin":
        return sum(tensor.numel() for tensor in torch.load(file, weights_only=True).values())
    if file.suffix != ".safetensors":
        return 0
    with file.open("rb") as handle:
        header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
    shapes = [words["shape"] for name, words in header.items() if name != "__metadata__"]
    return sum(int(torch.Size(shape).numel()) for shape in shapes)


def timed(work: Callable[[], Found]) -> tuple[Found, float]:
    """What a function returns, and its seconds."""
    started = time.monotonic()
    found = work()
    return found, time.monotonic() - started
