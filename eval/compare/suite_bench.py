"""Cells on the suite commonsense."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.compare.cells import Board, Cell
from eval.compare.mixture import Mixture, Tokens, as_dataset, digest, make_mixture
from eval.compare.sizes import source_of
from eval.compare.work import Bench, rows_a_step
from eval.scoring.model_scores import ModelScores
from eval.scoring.routing import analyse
from eval.scoring.scorer import Scorer
from eval.scoring.sources import Contestant
from eval.scoring.suite_run import score_model
from eval.suites.registry import Suite, load_suite
from moelora.runs.folder import ADAPTER, RunDir
from moelora.runs.models import load_model, load_tokenizer
from moelora.runs.parameters import ParameterCount


@dataclass
class SuiteBench(Bench):
    """What all cells of a comparison on the suite share.

    Args:
        suite: The tasks.
        mixture: The training rows.
    """

    suite: Suite
    mixture: Mixture

    @classmethod
    def open(cls, board: Board, sizes: dict[str, ParameterCount], command: str) -> SuiteBench:
        """Load what is needed."""
        config = board.config
        source = source_of(config)
        suite = load_suite("commonsense", config.protocol)
        tokenizer = load_tokenizer(source)
        scorer = Scorer(load_model(source), tokenizer, batch_size=1)
        return cls(board, tokenizer, sizes, command, suite, make_mixture(suite, scorer, config.data))

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
            "max_steps": self.steps(cell),
            # rows come as they are: in this order, cut to length, with labels on the answers
            "train_sampling_strategy": "sequential",
            "max_length": None,
        }
        return super().arguments(cell, folder, **{**fixed, **changes})

    def train(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """Train a cell's adapter, from where it was when the process died."""
        from train.sft import new_adapter, train_stage

        peft_config = self.config.methods[cell.method].peft_config()
        rows = self.rows(cell)
        train_stage(
            ADAPTER,
            lambda: new_adapter(load_model(source_of(self.config)), peft_config, self.config.adapter_dtype),
            self.arguments(cell, folder.checkpoints(ADAPTER)),
            folder,
            self.tokenizer,
            as_dataset(rows),
            label=cell.id,
        )
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

    def _contestant(self, cell: Cell, folder: RunDir) -> Contestant:
        return Contestant(self.config.methods[cell.method].title, "adapter", str(folder.stage(ADAPTER)))

    def score_base(self, cell: Cell) -> ModelScores:
        """Score the base model."""
        return self._score(Contestant("base", "base"))[0]

    def score(self, cell: Cell, folder: RunDir) -> ModelScores:
        """Score the trained adapter, and look at its routing."""
        contestant = self._contestant(cell, folder)
        scores, model = self._score(contestant)
        scores.extra["routing"] = analyse(
            model,
            self.tokenizer,
            self.suite,
            name=contestant.name,
            rows=self.config.evaluation.routing_rows,
            batch_size=self.config.evaluation.batch_size,
            folder=folder.root,
        )
        return scores

    def _score(self, contestant: Contestant) -> tuple[ModelScores, Any]:
        words = self.config.evaluation
        return score_model(
            contestant,
            source_of(self.config),
            self.tokenizer,
            self.suite,
            words.limit,
            words.batch_size,
            short_logits=True,
        )

    def trial(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """Loss of a token of the right answers on the rows for selection, by task and the mean over tasks."""
        config = self.config
        model = self._contestant(cell, folder).load(source_of(config))
        batch = config.evaluation.batch_size
        scorer = Scorer(model, self.tokenizer, batch_size=batch, name="selection", short_logits=True)
        losses = {}
        for task, rows in self.mixture.selection.items():
            requests = [((f"{task} {index}", ""), *row) for index, row in enumerate(rows)]
            found = scorer._loglikelihood_tokens(requests, disable_tqdm=True)
            total = sum(len(answer) for _, answer in rows)
            losses[task] = -sum(value for value, _ in found) / total
        return {"loss": sum(losses.values()) / len(losses), "losses": losses}
