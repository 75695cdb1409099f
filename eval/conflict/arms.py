"""Training and scoring the arms, each part once; what is finished is read from its file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from transformers import set_seed

from eval.compare.regimes.base import Work
from eval.conflict.measure import GRADIENT_BATCHES, conflict, told_apart
from eval.conflict.plan import ARMS, OWN, RANDOM, SHARED, Plan, warmup
from eval.conflict.split import Split, at_random
from eval.scoring.losses import BATCH, Example, row_losses
from moelora.compose.tokens import tokenize
from moelora.files import write_atomically
from moelora.runs.config import RunConfig, training_config
from moelora.runs.console import say
from moelora.runs.folder import RunDir
from moelora.runs.models import ModelSource, load_model

SCORES = "scores"
# Between two checkpoints, unless the configuration says otherwise: what a kill can cost.
_STEPS_BETWEEN_CHECKPOINTS = 25
# A centroid hardly moves with more rows than this.
CENTROID_ROWS = 64

# Losses of the rows of each task.
Losses = dict[str, list[float]]


@dataclass(frozen=True)
class Found:
    """What was measured.

    Args:
        rates: The chosen factor of the learning rate, by arm.
        selection: The mean loss on the rows for selection, by arm and factor.
        base: Losses of the scored rows.
        parts: By arm, losses of the scored rows for each of its LoRAs.
        conflict: See `measure.conflict`, at the `start` and at the `end` of the shared LoRA's training.
        told_apart: See `measure.told_apart`.
    """

    rates: dict[str, str]
    selection: dict[str, dict[str, float]]
    base: Losses
    parts: dict[str, list[Losses]]
    conflict: dict[str, Any]
    told_apart: dict[str, float]


class Arms:
    """The arms of a diagnosis in a folder.

    Args:
        config: The run whose tasks are looked at.
        plan: The trainings.
        split: The rows.
        folder: Where everything goes.
        tokenizer: The base's tokenizer.
    """

    def __init__(self, config: RunConfig, plan: Plan, split: Split, folder: RunDir, tokenizer: Any) -> None:
        self.config, self.plan, self.split, self.folder, self.tokenizer = config, plan, split, folder, tokenizer
        self.seed = training_config(config, folder.root).seed
        self.selection = self._tokenized(split.selection)
        self.scored = self._tokenized(split.scored)

    def _tokenized(self, rows: Mapping[str, Any]) -> dict[str, list[Example]]:
        return {task: list(tokenize(own, self.tokenizer)) for task, own in rows.items()}

    def measure(self) -> Found:
        """Train and score what is not done yet."""
        base = self._once("base", lambda: self._losses(self._base(), self.scored))
        selection: dict[str, dict[str, float]] = {}
        rates: dict[str, str] = {}
        parts: dict[str, list[Losses]] = {}
        for arm in ARMS:
            selection[arm] = {rate: self._try(arm, rate) for rate in self.plan.rates}
            rates[arm] = min(selection[arm], key=lambda rate: selection[arm][rate])
            parts[arm] = self._score(arm, rates[arm])
        start = self._once("conflict-start", lambda: self._conflict(self._start()))
        end = self._once("conflict-end", lambda: self._conflict(self._trained(rates[SHARED])))
        apart = self._once("told-apart", self._told_apart)
        return Found(rates, selection, base, parts, {"start": start, "end": end}, apart)

    def _once(self, name: str, make: Callable[[], Any]) -> Any:
        """What `make` returns, kept in a file that appears whole."""
        file = self.folder.root / SCORES / f"{name}.json"
        if not file.is_file():
            say(f"Scoring   {name}")
            write_atomically(file, json.dumps(make()) + "\n")
        return json.loads(file.read_text())

    def _try(self, arm: str, rate: str) -> float:
        """Train an arm at a learning rate; its mean loss on the rows for selection."""
        stages = self._train(arm, rate)

        def score() -> list[Losses]:
            found = []
            for task, stage in zip(self._asked_of(arm), stages, strict=True):
                asked = self.selection if task is None else {task: self.selection[task]}
                found.append(self._losses(self._load(stage), asked))
            return found

        losses = self._once(f"{arm}-{rate}x-selection", score)
        return fmean(fmean(values) for values in answered(arm, losses, self.plan.tasks).values())

    def _score(self, arm: str, rate: str) -> list[Losses]:
        """Losses of the scored rows for each LoRA of an arm."""
        stages = self.plan.stages(arm, rate)
        found: list[Losses] = self._once(
            f"{arm}-{rate}x", lambda: [self._losses(self._load(stage), self.scored) for stage in stages]
        )
        return found

    def _asked_of(self, arm: str) -> Sequence[str | None]:
        """The task that each LoRA of an arm has to answer; None for all."""
        return self.plan.tasks if arm == OWN else [None] * len(self.plan.steps_of(arm))

    def _train(self, arm: str, rate: str) -> list[str]:
        """Train the LoRAs of an arm at a learning rate; their stages."""
        plan = self.plan
        rows = self._rows(arm)
        stages = plan.stages(arm, rate)
        work = self._work(arm)
        for stage, label, own, steps in zip(stages, self._names(arm), rows, plan.steps_of(arm), strict=True):
            if not self.folder.is_finished(stage):
                changes = {"learning_rate": plan.rates[rate], "max_steps": steps}
                replace(work, label=label).train(stage, work.new_adapter, own, **changes)
            shutil.rmtree(self.folder.checkpoints(stage), ignore_errors=True)
        return stages

    def _names(self, arm: str) -> Sequence[str]:
        if arm == RANDOM:
            return [f"part {number + 1}" for number in range(len(self.plan.tasks))]
        return ["all rows"] if arm == SHARED else self.plan.tasks

    def _rows(self, arm: str) -> list[Any]:
        """The rows of each LoRA of an arm."""
        from datasets import concatenate_datasets

        train = self.split.train
        if arm == SHARED:
            return [concatenate_datasets(list(train.values()))]
        return list(train.values()) if arm == OWN else at_random(train, self.config.dataset.seed)

    def _work(self, arm: str) -> Work:
        from train.sft import RunTrainer

        config = self.config

        def arguments(stage: str, **changes: Any) -> Any:
            ours = {"save_steps": _STEPS_BETWEEN_CHECKPOINTS, "save_strategy": "steps"} | config.training
            given = training_config(config, self.folder.root)
            ours |= {"warmup_steps": warmup(given, changes["max_steps"], self.plan.steps)}
            return training_config(config, self.folder.checkpoints(stage), ours | changes)

        return Work(
            source=ModelSource(config.model, config.dtype, config.model_kwargs),
            tokenizer=self.tokenizer,
            folder=self.folder,
            rows=self.split.train,
            fit_rows={},
            seed=self.seed,
            make_config=lambda: self.plan.lora(arm),
            adapter_dtype=config.adapter_dtype,
            arguments=arguments,
            label=arm,
            trainer_class=RunTrainer,
        )

    def _base(self) -> Any:
        return _placed(load_model(self._work(SHARED).source))

    def _load(self, stage: str) -> Any:
        return _placed(self._work(SHARED).load(self.folder.stage(stage)))

    def _start(self) -> Any:
        """The fresh LoRA that the shared training starts from."""
        set_seed(self.seed)  # as `train_stage` does before it makes one
        return self._work(SHARED).new_adapter()

    def _trained(self, rate: str) -> Any:
        (stage,) = self.plan.stages(SHARED, rate)
        return self._work(SHARED).continued(self.folder.stage(stage))

    def _losses(self, model: Any, examples: Mapping[str, Sequence[Example]]) -> Losses:
        return {task: row_losses(model, own) for task, own in examples.items()}

    def _conflict(self, model: Any) -> dict[str, Any]:
        return conflict(_placed(model), self._first_of(GRADIENT_BATCHES * BATCH))

    def _told_apart(self) -> dict[str, float]:
        return told_apart(self._base(), self._first_of(CENTROID_ROWS), self.scored)

    def _first_of(self, count: int) -> dict[str, list[Example]]:
        """Up to `count` training rows of each task, tokenised; rows come shuffled."""
        return self._tokenized(
            {task: own.select(range(min(len(own), count))) for task, own in self.split.train.items()}
        )


def answered(arm: str, parts: Sequence[Losses], tasks: Sequence[str]) -> Losses:
    """The loss of an arm on each row: of the task's own LoRA, or the mean over the arm's LoRAs."""
    if arm == OWN:
        return {task: parts[index][task] for index, task in enumerate(tasks)}
    return {task: [fmean(values) for values in zip(*(part[task] for part in parts), strict=True)] for task in tasks}


def _placed(model: Any) -> Any:
    """A model in eval mode, on an accelerator if there is one."""
    if torch.accelerator.is_available():
        model = model.to(torch.accelerator.current_accelerator())
    return model.eval()
