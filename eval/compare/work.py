"""Doing a cell: training, scoring, and what is noted of it."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compare.cells import Board, Cell, identity
from eval.compare.schema import BenchmarkConfig
from eval.compare.sizes import source_of
from eval.receipt import make_receipt
from eval.scoring.model_scores import ModelScores
from eval.scoring.suite_run import card_metrics
from moelora.errors import TrainingError
from moelora.files import write_atomically
from moelora.runs.console import say
from moelora.runs.folder import RunDir
from moelora.runs.parameters import ParameterCount
from moelora.runs.trainer_arguments import trainer_arguments

# Between two checkpoints: what a kill can cost.
STEPS_BETWEEN_CHECKPOINTS = 25


@dataclass
class Bench:
    """What all cells of a comparison share; one class knows the suite, another the tasks of reasoning-gym.

    Args:
        board: Its files.
        tokenizer: Of the base model.
        sizes: Of the methods.
        command: How the comparison was started.
    """

    board: Board
    tokenizer: Any
    sizes: dict[str, ParameterCount]
    command: str

    @property
    def config(self) -> BenchmarkConfig:
        """The comparison."""
        return self.board.config

    def do(self, cell: Cell) -> None:
        """Do a cell from wherever it stands, and write its result as the last thing."""
        if cell.kind == "base":
            self._write(cell, self.score_base(cell), {})
            return
        folder = RunDir(self.board.folder(cell))
        folder.root.mkdir(parents=True, exist_ok=True)
        if cell.kind == "select":
            self._try(cell, folder)
            # nothing of a trial is used again
            shutil.rmtree(folder.root)
            return
        training = self.train(cell, folder)
        self._write(cell, self.score(cell, folder), training)
        shutil.rmtree(folder.root / "checkpoints", ignore_errors=True)

    def _try(self, cell: Cell, folder: RunDir) -> None:
        """Note what a learning rate is worth, or that it is too high to train at."""
        trained, started = 0.0, time.monotonic()
        try:
            training = self.train(cell, folder)
        except TrainingError as error:
            say(f"Diverged  {cell.id}: {error}")
            found: dict[str, Any] = {"diverged": str(error)}
        else:
            trained, started = training["seconds"], time.monotonic()
            found = {**self.trial(cell, folder), "training": training}
        seconds = round(trained + time.monotonic() - started, 1)
        receipt = self._receipt(cell, seconds)
        self.board.write_selection(
            cell, {"learning_rate": cell.learning_rate, **found, "seconds": seconds, "receipt": receipt}
        )

    def train(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """Train a cell, or resume it; what the trainer noted, with what makes trainings comparable."""
        raise NotImplementedError

    def trial(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """What a learning rate is chosen by, on the rows for selection; see `Board.chosen_rate`."""
        raise NotImplementedError

    def score_base(self, cell: Cell) -> ModelScores:
        """Score the base model."""
        raise NotImplementedError

    def score(self, cell: Cell, folder: RunDir) -> ModelScores:
        """Score what a cell has trained."""
        raise NotImplementedError

    def arguments(self, cell: Cell, folder: Path, **changes: Any) -> Any:
        """The trainer's arguments: they differ between methods in the learning rate alone."""
        checkpoints = {"save_steps": STEPS_BETWEEN_CHECKPOINTS, "logging_steps": 5}
        fixed = {"learning_rate": cell.learning_rate, "seed": cell.seed}
        return trainer_arguments(
            self.config.recipe, {**checkpoints, **self.config.training, **fixed, **changes}, folder
        )

    def _write(self, cell: Cell, scores: ModelScores, training: dict[str, Any]) -> None:
        scores.receipt.update(command=self.command, seeds=self._seeds(cell) if training else {})
        scores.extra.update(identity=identity(self.config, cell), cell=cell.id, training=training)
        if training:
            self._write_metrics(cell, scores)
        scores.write(self.board.file(cell))

    def _seeds(self, cell: Cell) -> dict[str, int]:
        return {"training": cell.seed, "rows": self.config.data.seed}

    def _receipt(self, cell: Cell, seconds: float) -> dict[str, Any]:
        """The circumstances of a trial; those of scores come with them."""
        source = source_of(self.config)
        return make_receipt(
            config={"model": source.model, "dtype": source.dtype, "model_kwargs": source.model_kwargs},
            seeds=self._seeds(cell),
            seconds=seconds,
            command=self.command,
        )

    def _write_metrics(self, cell: Cell, scores: ModelScores) -> None:
        """Leave the scores in the cell's folder too, beside the base's, for `moelora report` and `moelora push`."""
        base = Cell("base")
        beside = [self.board.read_scores(base)] if self.board.is_finished(base) else []
        content = json.dumps(card_metrics([*beside, scores]), indent=1) + "\n"
        write_atomically(self.board.folder(cell) / "metrics.json", content)


def rows_a_step(training: dict[str, Any]) -> int:
    """Rows of an optimizer step on one device."""
    return int(training.get("per_device_train_batch_size", 8)) * int(training.get("gradient_accumulation_steps", 1))


def open_bench(board: Board, sizes: dict[str, ParameterCount], command: str) -> Bench:
    """The bench of a comparison, with all that it needs loaded."""
    if board.config.has_skills:
        from eval.compare.skill_bench import SkillBench

        return SkillBench.open(board, sizes, command)
    from eval.compare.suite_bench import SuiteBench

    return SuiteBench.open(board, sizes, command)
