"""How long the rest of a comparison will take."""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eval.compare.cells import BASE, Board, Cell
from eval.compare.mixture import as_dataset, padded
from eval.compare.sizes import source_of
from eval.compare.suite_bench import SuiteBench
from eval.compare.work import Bench, rows_a_step
from moelora.files import write_atomically
from moelora.runs.console import say
from moelora.runs.models import load_model
from moelora.runs.wording import minutes

PROBE_STEPS = 3
# Of a training step: what scoring a token costs beside training on it, before a measurement is there.
_FORWARD_SHARE = 0.5
_TOKENS_A_ROW = 135
_TASKS = 8
_LOADING = 15.0
_EPOCHS = 3  # the trainer's default


@dataclass
class Timing:
    """Seconds of an average optimizer step, by method, and of scoring, by cell kind.

    Args:
        steps: Method to seconds per step.
        scoring: Method, or "base", to seconds of scoring.
    """

    steps: dict[str, float] = field(default_factory=dict)
    scoring: dict[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, board: Board) -> Timing:
        """What finished cells and earlier probes have measured."""
        file = board.work / "probe.json"
        timing = cls(steps=json.loads(file.read_text()) if file.is_file() else {})
        for cell in board.cells():
            if not board.is_finished(cell):
                continue
            if cell.kind != "select":
                timing.scoring[cell.method or BASE] = board.read_scores(cell).seconds
            if cell.kind != "base":
                content = board.read_json(cell)
                training = content.get("extra", content).get("training")  # a trial that diverged has none
                if training and training["timed_steps"] and training["seconds"]:
                    timing.steps[cell.method] = training["seconds"] / training["timed_steps"]
        return timing

    def estimate(self, board: Board, cell: Cell) -> float | None:
        """Seconds of a cell; None where nothing is known of its method."""
        if cell.kind == "base":
            return self._scoring(board, cell)
        config = board.config
        if config.methods[cell.method].regime.made_of is not None:
            return self._scoring(board, cell) + _LOADING
        step = self.steps.get(cell.method)
        if step is None:
            return None
        if config.has_skills:
            epochs = config.training.get("num_train_epochs", _EPOCHS)
            steps = epochs * len(config.data.tasks) * config.data.rows_per_task / rows_a_step(config.training)
            return steps * step + self._scoring(board, cell) + 2 * _LOADING
        if cell.kind == "select":
            rows = len(config.data.tasks) * config.data.selection_rows
            return (
                config.selection.steps * step + rows / rows_a_step(config.training) * step * _FORWARD_SHARE + _LOADING
            )
        return config.data.steps * step + self._scoring(board, cell) + 2 * _LOADING

    def _scoring(self, board: Board, cell: Cell) -> float:
        known = self.scoring.get(cell.method or BASE)
        if known is not None:
            return known
        if board.config.has_skills:
            return max(self.scoring.values(), default=60.0)
        step = self.steps.get(cell.method) or min(self.steps.values(), default=2.0)
        if self.scoring.get(BASE) and self.steps:
            # slower than the base about as training is slower than the fastest training
            return self.scoring[BASE] * max(1.0, step / min(self.steps.values()))
        rows = (board.config.evaluation.limit or 1500) * _TASKS
        return rows * _TOKENS_A_ROW * step * _FORWARD_SHARE / (55 * rows_a_step(board.config.training))


def probe(bench: Bench) -> None:
    """Time a few steps on batches of average size of every method that was never timed, and note the result.

    Only on the suite: its cells take half an hour, those on tasks of reasoning-gym minutes.
    """
    if not isinstance(bench, SuiteBench):
        return
    board = bench.board
    timing = Timing.of(board)
    missing = [key for key in bench.config.methods if key not in timing.steps]
    if not missing:
        return
    say(f"Probing   {PROBE_STEPS} steps of {', '.join(missing)}, for the estimate")
    for key in missing:
        timing.steps[key] = _seconds_a_step(bench, key)
        write_atomically(board.work / "probe.json", json.dumps(timing.steps, indent=1) + "\n")


def _seconds_a_step(bench: SuiteBench, method: str) -> float:
    from train.sft import make_trainer, new_adapter

    # the rate changes no time
    rate = bench.config.methods[method].learning_rate or bench.config.selection.learning_rates[0]
    cell = Cell("final", method, 0, rate)
    rows, size = bench.rows(cell), rows_a_step(bench.config.training)
    lengths = padded(rows, size)
    mean = sum(lengths) / len(lengths)
    nearest = sorted(range(len(lengths)), key=lambda index: abs(lengths[index] - mean))[: PROBE_STEPS + 1]
    chosen = [row for index in nearest for row in rows[index * size : (index + 1) * size]]
    with tempfile.TemporaryDirectory() as folder:
        changes: dict[str, Any] = {"save_strategy": "no", "logging_strategy": "no", "warmup_steps": 0}
        arguments = bench.arguments(cell, Path(folder), **changes, max_steps=1)
        config = bench.config
        trainer = make_trainer(
            new_adapter(load_model(source_of(config)), config.methods[method].peft_config(), config.adapter_dtype),
            arguments,
            as_dataset(chosen),
            bench.tokenizer,
        )
        trainer.train()  # the first step pays for what is set up once
        trainer.args.max_steps = PROBE_STEPS
        started = time.monotonic()
        trainer.train()
        return (time.monotonic() - started) / PROBE_STEPS


def show(board: Board) -> None:
    """Print what is done, what is left, and how long it will take."""
    config, timing = board.config, Timing.of(board)
    cells = board.cells()
    left = [cell for cell in cells if not board.is_finished(cell)]
    counts = {kind: [cell for cell in cells if cell.kind == kind] for kind in ("base", "select", "final")}
    composed = [cell for cell in counts["final"] if config.methods[cell.method].regime.made_of is not None]
    trained = len({cell.method for cell in counts["select"]})
    of_steps = "" if config.has_skills else f" of {config.selection.steps} steps"
    each = "" if config.has_skills else f" of {config.data.steps} steps"
    say(
        f"Plan      {len(cells)} cells: the base model scored; "
        + (
            f"{len(counts['select'])} trials{of_steps} to choose learning rates "
            f"({len(config.selection.learning_rates)} each of {trained} methods); "
            if trained
            else "learning rates are given; "
        )
        + f"{len(counts['final']) - len(composed)} trainings{each}, scored"
        + (f"; {len(composed)} compositions, scored" if composed else "")
    )
    say(f"Done      {len(cells) - len(left)} of {len(cells)}")
    for key in (BASE, *config.methods):
        mine = [cell for cell in left if (cell.method or BASE) == key]
        if not mine:
            continue
        seconds, _ = _sum(board, timing, mine)
        parts = ", ".join(cell.id.removeprefix(f"{key}-") for cell in mine)
        say(f"          {key}: {parts}" + (f", about {minutes(seconds)}" if seconds else ""))
    if left:
        say(f"Left      {remaining(board, timing, left)}")


def remaining(board: Board, timing: Timing, cells: list[Cell]) -> str:
    """How long some cells will take by what is measured, and of how many that is not known."""
    seconds, unknown = _sum(board, timing, cells)
    known = f"about {_hours(seconds)}" if seconds else ""
    return ", and ".join(filter(None, (known, f"{unknown} cells that nothing is known of" if unknown else "")))


def _sum(board: Board, timing: Timing, cells: list[Cell]) -> tuple[float, int]:
    """Seconds of the cells that something is known of, and the number of the others."""
    estimates = [timing.estimate(board, cell) for cell in cells]
    known = [each for each in estimates if each is not None]
    return sum(known), len(estimates) - len(known)


def _hours(seconds: float) -> str:
    whole = round(seconds / 60)
    return f"{whole // 60} h {whole % 60:02d} min" if whole >= 60 else f"{max(whole, 1)} min"
