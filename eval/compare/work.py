"""Doing a cell: training, scoring, and the analysis of its routing."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compare.cells import Board, Cell, identity
from eval.compare.mixture import Mixture, Tokens, as_dataset, digest, make_mixture
from eval.compare.schema import BenchmarkConfig
from eval.compare.sizes import source_of
from eval.scoring.model_scores import ModelScores
from eval.scoring.routing import analyse
from eval.scoring.scorer import Scorer
from eval.scoring.sources import Contestant
from eval.scoring.suite_run import card_metrics, score_model
from eval.suites.registry import Suite, load_suite
from moelora.files import write_atomically
from moelora.runs.folder import ADAPTER, RunDir
from moelora.runs.models import load_model, load_tokenizer
from moelora.runs.parameters import ParameterCount
from moelora.runs.trainer_arguments import sft_arguments

# Between two checkpoints: what a kill can cost.
STEPS_BETWEEN_CHECKPOINTS = 25


@dataclass
class Bench:
    """What all cells of a comparison share.

    Args:
        board: Its files.
        suite: The tasks.
        tokenizer: Of the base model.
        mixture: The training rows.
        sizes: Of the methods.
        command: How the comparison was started.
    """

    board: Board
    suite: Suite
    tokenizer: Any
    mixture: Mixture
    sizes: dict[str, ParameterCount]
    command: str

    @classmethod
    def open(cls, board: Board, sizes: dict[str, ParameterCount], command: str) -> Bench:
        """Load what is needed."""
        config = board.config
        source = source_of(config)
        suite = load_suite("commonsense", config.protocol)
        tokenizer = load_tokenizer(source)
        scorer = Scorer(load_model(source), tokenizer, batch_size=1)
        return cls(board, suite, tokenizer, make_mixture(suite, scorer, config.data), sizes, command)

    @property
    def config(self) -> BenchmarkConfig:
        """The comparison."""
        return self.board.config

    def steps(self, cell: Cell) -> int:
        """Optimizer steps of a cell."""
        return self.config.selection.steps if cell.kind == "select" else self.config.data.steps

    def rows(self, cell: Cell) -> list[Tokens]:
        """The rows that a cell trains on, in their order: the same for all methods."""
        size = rows_a_step(self.config.training)
        return self.mixture.ordered(self.config.data, steps=self.steps(cell), batch_size=size, seed=cell.seed)

    def arguments(self, cell: Cell, folder: Path, **changes: Any) -> Any:
        """The trainer's arguments: they differ between methods in the learning rate alone."""
        fixed = {
            "learning_rate": cell.learning_rate,
            "max_steps": self.steps(cell),
            "seed": cell.seed,
            # rows come as they are: in this order, cut to length, with labels on the answers
            "train_sampling_strategy": "sequential",
            "max_length": None,
        }
        checkpoints = {"save_steps": STEPS_BETWEEN_CHECKPOINTS, "logging_steps": 5}
        return sft_arguments({**checkpoints, **self.config.training, **fixed, **changes}, folder)

    def train(self, cell: Cell) -> RunDir:
        """Train a cell's adapter, from where it was when the process died."""
        from train.sft import new_adapter, train_stage

        folder = RunDir(self.board.folder(cell))
        folder.root.mkdir(parents=True, exist_ok=True)
        peft_config = self.config.methods[cell.method].peft_config()
        train_stage(
            ADAPTER,
            lambda: new_adapter(load_model(source_of(self.config)), peft_config, self.config.adapter_dtype),
            self.arguments(cell, folder.checkpoints(ADAPTER)),
            folder,
            self.tokenizer,
            as_dataset(self.rows(cell)),
            label=cell.id,
        )
        return folder

    def do(self, cell: Cell) -> None:
        """Do a cell from wherever it stands, and write its result as the last thing."""
        if cell.kind == "base":
            self._score(cell, Contestant("base", "base"), {})
            return
        folder = self.train(cell)
        training = self._training(cell, folder)
        contestant = Contestant(self.config.methods[cell.method].title, "adapter", str(folder.stage(ADAPTER)))
        if cell.kind == "select":
            started = time.monotonic()
            losses = self._losses(contestant)
            self.board.write_selection(
                cell,
                {
                    "learning_rate": cell.learning_rate,
                    "loss": sum(losses.values()) / len(losses),
                    "losses": losses,
                    "training": training,
                    "seconds": round(training["seconds"] + time.monotonic() - started, 1),
                },
            )
            # nothing of a trial is used again
            shutil.rmtree(folder.root)
            return
        self._score(cell, contestant, training)
        shutil.rmtree(folder.root / "checkpoints", ignore_errors=True)

    def _score(self, cell: Cell, contestant: Contestant, training: dict[str, Any]) -> None:
        words = self.config.evaluation
        scores, model = score_model(
            contestant,
            source_of(self.config),
            self.tokenizer,
            self.suite,
            words.limit,
            words.batch_size,
            short_logits=True,
        )
        scores.receipt["command"] = self.command
        scores.receipt["seeds"] = {"training": cell.seed, "rows": self.config.data.seed} if training else {}
        scores.extra.update(identity=identity(self.config, cell), cell=cell.id, training=training)
        if training:
            scores.extra["routing"] = self._routing(cell, contestant.name, model)
            self._write_metrics(cell, scores)
        scores.write(self.board.file(cell))

    def _write_metrics(self, cell: Cell, scores: ModelScores) -> None:
        """Leave the scores in the cell's folder too, beside the base's, for `moelora report` and `moelora push`."""
        base = Cell("base")
        beside = [self.board.read_scores(base)] if self.board.is_finished(base) else []
        content = json.dumps(card_metrics([*beside, scores]), indent=1) + "\n"
        write_atomically(self.board.folder(cell) / "metrics.json", content)

    def _training(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """What the trainer noted, with what makes trainings comparable."""
        rows = self.rows(cell)
        record = json.loads((folder.stage(ADAPTER) / "training.json").read_text())
        tokens = sum(len(prompt) + len(answer) for prompt, answer in rows)
        timed = tokens * record["timed_steps"] / record["steps"]
        return {
            **record,
            "learning_rate": cell.learning_rate,
            "rows": len(rows),
            "rows_sha256": digest(rows),
            "tokens": tokens,
            "tokens_per_second": round(timed / record["seconds"], 1) if record["seconds"] else None,
        }

    def _losses(self, contestant: Contestant) -> dict[str, float]:
        """Mean negative log-likelihood of a token of the right answers, by task, on the rows for selection."""
        config = self.config
        model = contestant.load(source_of(config))
        batch = config.evaluation.batch_size
        scorer = Scorer(model, self.tokenizer, batch_size=batch, name="selection", short_logits=True)
        losses = {}
        for task, rows in self.mixture.selection.items():
            requests = [((f"{task} {index}", ""), *row) for index, row in enumerate(rows)]
            found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
            total = sum(len(answer) for _, answer in rows)
            losses[task] = -sum(value for value, _ in found) / total
        return losses

    def _routing(self, cell: Cell, name: str, model: Any) -> dict[str, Any] | None:
        return analyse(
            model,
            self.tokenizer,
            self.suite,
            name=name,
            rows=self.config.evaluation.routing_rows,
            batch_size=self.config.evaluation.batch_size,
            folder=self.board.folder(cell),
        )


def rows_a_step(training: dict[str, Any]) -> int:
    """Rows of an optimizer step on one device."""
    return int(training.get("per_device_train_batch_size", 8)) * int(training.get("gradient_accumulation_steps", 1))
