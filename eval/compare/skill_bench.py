"""Cells on tasks of reasoning-gym, whichever way a method sees the tasks."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from eval.compare.cells import Board, Cell
from eval.compare.measures import MEASURES, Measure
from eval.compare.regimes.apart import Apart
from eval.compare.regimes.base import Regime, Work, joined
from eval.compare.schema import SkillData
from eval.compare.sizes import source_of
from eval.compare.work import Bench
from eval.receipt import make_receipt
from eval.scoring.judging import majority_share
from eval.scoring.model_scores import ModelScores, TaskScores
from eval.scoring.own_tasks import TaskResult, ask_after, make_problems
from eval.scoring.routing import chosen_by_task, chosen_experts, routes_by_sequence
from eval.suites.rules import register
from moelora.errors import RunError
from moelora.runs.config import DatasetConfig, EvaluationConfig, RunConfig
from moelora.runs.console import say
from moelora.runs.data import load_rows
from moelora.runs.folder import RunDir, rows_digest
from moelora.runs.models import load_model, load_tokenizer
from moelora.runs.parameters import ParameterCount
from moelora.runs.wording import minutes

# reasoning-gym makes problem i from `seed + i`: far enough apart for any number of problems.
_SELECTION, _SCORED = 500_000, 1_000_000


@dataclass
class SkillBench(Bench):
    """What all cells of a comparison on tasks of reasoning-gym share.

    Args:
        measure: What is trained for and scored.
        rows: Training rows by task.
        selection: Problems for choosing the learning rate.
        problems: The problems that are scored.
        foreign: Prompts of tasks that nothing is trained on.
    """

    measure: Measure
    rows: dict[str, Any]
    selection: list[TaskResult]
    problems: list[TaskResult]
    foreign: list[dict[str, list[int]]]

    @classmethod
    def open(cls, board: Board, sizes: dict[str, ParameterCount], command: str) -> SkillBench:
        """Make all rows and problems."""
        register()
        config = board.config
        data: SkillData = config.data
        tokenizer = load_tokenizer(source_of(config))
        run = _run(config, data.tasks, _SCORED + data.seed)
        measure = MEASURES[config.recipe](run, tokenizer, config.evaluation.batch_size)
        whole = load_rows(run.dataset, tokenizer, config.recipe)
        rows = {task: whole.select([i for i, each in enumerate(whole["task"]) if each == task]) for task in data.tasks}
        trial = _run(config, data.tasks, _SELECTION + data.seed)
        held_out = make_problems(trial, tokenizer, data.selection_rows)
        problems = make_problems(run, tokenizer, config.evaluation.limit)
        _check_apart(held_out, problems)
        for key, found in (("data.selection_rows", held_out), ("evaluation.limit", problems)):
            for task in found:
                measure.prepare(task, key)
        if turns := config.evaluation.earlier_turns:
            ask_after(held_out, turns, trial, tokenizer)
            ask_after(problems, turns, run, tokenizer)
        foreign: list[dict[str, list[int]]] = []
        if data.foreign:
            others = make_problems(_run(config, data.foreign, _SCORED + data.seed), tokenizer, config.evaluation.limit)
            foreign = [{"input_ids": prompt} for each in others for prompt in each.prompts]
        return cls(board, tokenizer, sizes, command, measure, rows, held_out, problems, foreign)

    def _regime(self, cell: Cell) -> Regime:
        regime: Regime = self.config.methods[cell.method].regime
        return regime

    def _work(self, cell: Cell, folder: RunDir) -> Work:
        method = self.config.methods[cell.method]
        order = self.config.data.order(cell.seed)
        parent = method.regime.made_of
        parts = None
        if parent is not None:
            of = self.board.final(parent, cell.seed)
            parts = self.config.methods[parent].regime.adapters(self.board.folder(of), list(self.rows))
            missing = [str(path) for path in parts.values() if not (path / "adapter_config.json").is_file()]
            if missing:
                raise RunError(
                    f"{cell.id} is made of LoRAs that are not there any more: {', '.join(missing)}. Remove "
                    f"{str(self.board.file(of))!r} to have them trained again."
                )
        first = {task: rows.select(range(self.config.data.fit_rows)) for task, rows in self.rows.items()}
        return Work(
            source=source_of(self.config),
            tokenizer=self.tokenizer,
            folder=folder,
            rows={task: self.rows[task] for task in order},
            fit_rows={part: joined(first, its) for part, its in self._parts(cell).items()},
            seed=cell.seed,
            make_config=method.peft_config,
            adapter_dtype=self.config.adapter_dtype,
            arguments=lambda stage, **changes: self.arguments(cell, folder.checkpoints(stage), **changes),
            label=cell.id,
            trainer_class=self.measure.trainer_class(),
            parts=parts,
        )

    def _parts(self, cell: Cell) -> dict[str, list[str]]:
        """What has an adapter or an expert of its own, and the tasks that it is for."""
        regime = self._regime(cell)
        if regime.made_of is not None:
            regime = self.config.methods[regime.made_of].regime
        return regime.parts(list(self.rows)) if isinstance(regime, Apart) else {task: [task] for task in self.rows}

    def train(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """Train as the method's regime says; scores right after each task, where they come one after the other."""
        started = time.monotonic()
        work = self._work(cell, folder)
        stages = self._regime(cell).train(work)
        records = [json.loads(file.read_text()) for file in sorted(folder.root.rglob("training.json"))]
        found = {
            "steps": sum(each["steps"] for each in records),
            "timed_steps": sum(each["timed_steps"] for each in records),
            "seconds": round(sum(each["seconds"] for each in records), 1) or round(time.monotonic() - started, 1),
            "learning_rate": cell.learning_rate,
            "rows": sum(len(rows) for rows in self.rows.values()),
            "rows_sha256": rows_digest([row for task in sorted(self.rows) for row in self.rows[task]])["sha256"],
            "tokens_per_second": None,
            "order": list(work.rows),
        }
        if stages and cell.kind == "final":
            by_task = {each.task: each for each in self.problems}
            found["learned"] = {
                task: self._values(work.load(adapter), [by_task[task]])[task] for task, adapter in stages.items()
            }
        return found

    def trial(self, cell: Cell, folder: RunDir) -> dict[str, Any]:
        """What the problems for selection say of a learning rate, see `Measure.trial`."""
        exact: dict[str, float] = {}
        losses: dict[str, float] = {}
        for tasks, model in self._regime(cell).models(self._work(cell, folder), list(self.rows)):
            for result in self.selection:
                if result.task in tasks:
                    exact[result.task], losses[result.task] = self.measure.trial(model, result)
        return {
            "exact": sum(exact.values()) / len(exact),
            "exact_by_task": exact,
            "loss": sum(losses.values()) / len(losses),
            "losses": losses,
        }

    def score_base(self, cell: Cell) -> ModelScores:
        """See `Bench.score_base`."""
        started = time.monotonic()
        values = self._values(load_model(source_of(self.config)).eval(), self.problems)
        return self._scores("base", "base", values, time.monotonic() - started, ParameterCount(0, 0, self._base_size))

    @property
    def _base_size(self) -> int:
        return next(iter(self.sizes.values())).base

    def score(self, cell: Cell, folder: RunDir) -> ModelScores:
        """See `Bench.score`."""
        started = time.monotonic()
        values: dict[str, list[float]] = {}
        extra: dict[str, Any] = {}
        for tasks, model in self._regime(cell).models(self._work(cell, folder), list(self.rows)):
            values |= self._values(model, [each for each in self.problems if each.task in tasks])
            if routes_by_sequence(model):
                extra["chosen"] = self._chosen(model, self._parts(cell))
        method = self.config.methods[cell.method]
        values = {task: values[task] for task in self.rows}
        scores = self._scores(
            method.title, method.regime.kind, values, time.monotonic() - started, self.sizes[cell.method]
        )
        return replace(scores, extra=extra)

    def _values(self, model: Any, problems: Sequence[TaskResult]) -> dict[str, list[float]]:
        """1 for each problem that a model is right about, else 0."""
        return {task.task: self.measure.values(model, task) for task in problems}

    def _scores(
        self, name: str, kind: str, values: Mapping[str, list[float]], seconds: float, size: ParameterCount
    ) -> ModelScores:
        import reasoning_gym

        tasks = {}
        for task in self.problems:
            digest = hashlib.sha256(json.dumps(self.measure.asked(task)).encode()).hexdigest()
            version = getattr(reasoning_gym, "__version__", "?")
            floor = self.measure.floor(task)
            tasks[task.task] = TaskScores(self.measure.metric, version, digest, floor, values[task.task], {})
        mean = sum(sum(each) / len(each) for each in values.values()) / len(values)
        say(f"{name}  mean {100 * mean:.1f}  {minutes(seconds)}")
        config = self.config
        return ModelScores(
            name=name,
            suite="reasoning-gym",
            protocol=self.measure.metric,
            chat=self.tokenizer.chat_template is not None,
            limit=config.evaluation.limit,
            tasks=tasks,
            parameters=size.to_json(),
            seconds=round(seconds, 2),
            tokens=sum(len(prompt) for task in self.problems for prompt in task.prompts),
            kind=kind,
            receipt=make_receipt(
                config={"model": config.model, "dtype": config.dtype, "model_kwargs": config.model_kwargs},
                seeds={},
                seconds=seconds,
                command="",
            ),
        )

    def _chosen(self, model: Any, parts: dict[str, list[str]]) -> dict[str, Any]:
        """Where a router that decides once for a sequence sends prompts: to the expert of their task, to none."""
        texts = {each.task: each.prompts for each in self.selection}
        part_of = {task: part for part, tasks in parts.items() for task in tasks}
        found = chosen_by_task(model, texts)
        own = {task: counts[part_of[task]] / sum(counts.values()) for task, counts in found.items()}
        shares: dict[str, Any] = {"own": own}
        if self.foreign:
            chosen = chosen_experts(model, self.foreign)
            shares["foreign_at_base"] = sum(expert < 0 for expert in chosen) / len(chosen)
        return shares


def _run(config: Any, tasks: dict[str, Any], seed: int) -> RunConfig:
    """Tasks as a run has them, with the seed of its fresh problems."""
    data: SkillData = config.data
    dataset = DatasetConfig(tasks=tasks, rows_per_task=data.rows_per_task, seed=data.seed, system=data.system)
    return RunConfig(
        model=config.model,
        output_dir=config.output_dir,
        dataset=dataset,
        adapter={"preset": "lora"},
        dtype=config.dtype,
        model_kwargs=config.model_kwargs,
        evaluation=EvaluationConfig(seed=seed),
    )


def _check_apart(held_out: Sequence[TaskResult], scored: Sequence[TaskResult]) -> None:
    """Take the problems for selection out of the scored ones."""
    for trial, task in zip(held_out, scored, strict=True):
        seen = {problem.prompt for problem in trial.problems}
        kept = [i for i, problem in enumerate(task.problems) if problem.prompt not in seen]
        if len(kept) < 0.8 * len(task.problems):
            raise RunError(
                f"task {task.task!r} has too few problems: {len(task.problems) - len(kept)} of {len(task.problems)} "
                "that are scored are also for choosing the learning rate. Give it options with more variety."
            )
        task.problems = [task.problems[i] for i in kept]
        task.prompts = [task.prompts[i] for i in kept]
        task.majority = majority_share([problem.answer for problem in task.problems])
