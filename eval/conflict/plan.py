"""What a diagnosis trains, at which size, for how many steps, and how long that takes."""

from __future__ import annotations

import dataclasses
import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.conflict.split import Split
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.config import BaselineConfig, RunConfig, adapter_config, training_config
from moelora.runs.folder import STAGES
from moelora.runs.models import ModelSource, load_model

ARMS = ("shared", "own", "random")
SHARED, OWN, RANDOM = ARMS
_PROBE_STEPS = 2
# A forward is about a third of a step's forward and backward.
_FORWARD_SHARE = 1 / 3


@dataclass(frozen=True, kw_only=True)
class Options:
    """What somebody who asks for a diagnosis may choose.

    Args:
        rates: Factors of the configuration's learning rate; each arm takes the best of them.
        held_out: Share of each task's prompts that is not trained on.
        margin: Headroom, in nats a token, that is worth having.

    Raises:
        RunError: For a value out of range.
    """

    rates: tuple[float, ...] = (1.0, 2.0)
    held_out: float = 0.3
    margin: float = 0.02

    def __post_init__(self) -> None:
        if not self.rates or min(self.rates) <= 0 or len(set(self.rates)) < len(self.rates):
            raise RunError(f"--rates are {self.rates}; allowed: different positive factors, such as 1 2 4.")
        if not 0 < self.held_out < 1:
            raise RunError(f"--held-out is {self.held_out}; allowed: a share between 0 and 1, such as 0.3.")
        if not self.margin > 0:
            raise RunError(f"--margin is {self.margin}; allowed: a positive number of nats, such as 0.02.")

    def words(self) -> list[str]:
        """What is not at its default, as words of a command line."""
        words = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value != field.default:
                numbers = value if isinstance(value, tuple) else (value,)
                words += [f"--{field.name.replace('_', '-')}", *(f"{number:g}" for number in numbers)]
        return words


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The trainings.

    Args:
        tasks: The tasks.
        rates: Learning rates by the factor that names them.
        adapter_parameters: Trainable parameters of the configuration's adapter.
        rank_parameters: Of a LoRA, for each rank.
        rank: Of the shared LoRA: the nearest to the adapter's size that is a multiple of the number of tasks.
        scaling: Alpha by rank, as in the adapter's experts.
        dropout: As in the adapter's experts.
        target_modules: Of every LoRA.
        task_type: As in PEFT.
        steps: Of the shared LoRA.
        part_steps: Of each task's LoRA, and of each random part's: their sum is `steps`.
        step_rows: Rows of a step.
    """

    tasks: tuple[str, ...]
    rates: dict[str, float]
    adapter_parameters: int
    rank_parameters: int
    rank: int
    scaling: float
    dropout: float
    target_modules: str | list[str]
    task_type: str | None
    steps: int
    part_steps: tuple[int, ...]
    step_rows: int

    @property
    def part_rank(self) -> int:
        """Of a LoRA for one task or one random part."""
        return self.rank // len(self.tasks)

    def stages(self, arm: str, rate: str) -> list[str]:
        """Names of an arm's trainings in the folder."""
        count = 1 if arm == SHARED else len(self.tasks)
        return [f"{STAGES}/{arm}-{rate}x-{part + 1}" for part in range(count)]

    def steps_of(self, arm: str) -> tuple[int, ...]:
        """Steps of an arm's trainings."""
        return (self.steps,) if arm == SHARED else self.part_steps

    def lora(self, arm: str) -> Any:
        """The `peft.LoraConfig` of an arm."""
        from peft import LoraConfig

        r = self.rank if arm == SHARED else self.part_rank
        return LoraConfig(
            r=r,
            lora_alpha=r * self.scaling,
            lora_dropout=self.dropout,
            target_modules=self.target_modules,
            task_type=self.task_type,
        )

    def to_json(self) -> dict[str, Any]:
        """As a mapping."""
        return dataclasses.asdict(self)


def make_plan(config: RunConfig, split: Split, options: Options) -> Plan:
    """The trainings that a configuration asks for.

    Args:
        config: The run whose tasks are looked at.
        split: Its rows.
        options: The choices.

    Raises:
        RunError: If the adapter is one that is trained further.
    """
    from train.baseline import sizes_to_match

    if "path" in config.adapter:
        raise RunError(
            f"adapter.path is {config.adapter['path']!r}; allowed: adapter.preset. A diagnosis trains new LoRAs of the "
            "size that the preset has."
        )
    adapter = adapter_config(config)
    targets = (config.baseline or BaselineConfig()).target_modules
    whole, unit = sizes_to_match(config, targets, adapter)
    count = len(split.train)
    arguments = training_config(config, Path(config.output_dir))
    step_rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    sizes = [len(rows) for rows in split.train.values()]
    steps = arguments.max_steps
    if steps <= 0:
        steps = math.ceil(arguments.num_train_epochs * math.ceil(sum(sizes) / step_rows))
    steps = max(steps, count)
    return Plan(
        tasks=tuple(split.train),
        rates={f"{factor:g}": factor * arguments.learning_rate for factor in options.rates},
        adapter_parameters=whole,
        rank_parameters=unit,
        rank=count * max(1, round(whole / unit / count)),
        scaling=adapter.scaling,
        dropout=adapter.experts.lora_dropout,
        target_modules=targets,
        task_type=adapter.task_type,
        steps=steps,
        part_steps=tuple(_shares(steps, sizes)),
        step_rows=step_rows,
    )


def _shares(total: int, sizes: Sequence[int]) -> list[int]:
    """`total` in whole parts that are near to proportional to `sizes`, each at least 1."""
    exact = [(total - len(sizes)) * size / sum(sizes) for size in sizes]
    parts = [1 + math.floor(each) for each in exact]
    by_rest = sorted(range(len(sizes)), key=lambda i: math.floor(exact[i]) - exact[i])
    for i in by_rest[: total - sum(parts)]:
        parts[i] += 1
    return parts


def warmup(arguments: Any, steps: int, whole: int) -> float:
    """Warm-up of a training of `steps` where one of `whole` steps has that of the configuration."""
    given = float(arguments.warmup_steps)
    return given if given < 1 else max(1, round(given * steps / whole))


def seconds_a_step(config: RunConfig, plan: Plan, rows: Any, tokenizer: Any) -> float:
    """Time a few steps of the shared LoRA.

    Args:
        config: The run.
        plan: The trainings.
        rows: Rows to train on; as many as the steps want.
        tokenizer: The base's tokenizer.
    """
    from train.sft import make_trainer, new_adapter

    some = rows.select(range(min(len(rows), plan.step_rows * _PROBE_STEPS)))
    base = load_model(ModelSource(config.model, config.dtype, config.model_kwargs))
    with tempfile.TemporaryDirectory() as folder:
        changes = {"max_steps": 1, "save_strategy": "no", "logging_strategy": "no", "warmup_steps": 0}
        arguments = training_config(config, Path(folder), changes)
        trainer = make_trainer(new_adapter(base, plan.lora(SHARED), config.adapter_dtype), arguments, some, tokenizer)
        trainer.train()  # the first step pays for what is set up once
        trainer.args.max_steps = _PROBE_STEPS
        started = time.monotonic()
        trainer.train()
        return (time.monotonic() - started) / _PROBE_STEPS


def seconds_left(plan: Plan, split: Split, step: float, is_trained: Any) -> float:
    """About how long the trainings that are not done, and all scoring, take.

    Args:
        plan: The trainings.
        split: The rows.
        step: Seconds of a step.
        is_trained: Says of a stage's name whether it is trained.
    """
    steps = sum(
        count
        for arm in ARMS
        for rate in plan.rates
        for stage, count in zip(plan.stages(arm, rate), plan.steps_of(arm), strict=True)
        if not is_trained(stage)
    )
    tasks = len(plan.tasks)
    chosen, scored = (sum(len(rows) for rows in part.values()) for part in (split.selection, split.scored))
    forwards = len(plan.rates) * chosen * (2 + tasks) + scored * (2 + 2 * tasks)
    return steps * step + forwards * step * _FORWARD_SHARE / plan.step_rows


class Timing:
    """What a probe has measured, kept in a folder.

    Args:
        folder: The folder.
    """

    def __init__(self, folder: Path) -> None:
        self.file = folder / "probe.json"

    def read(self) -> float | None:
        """Seconds of a step; None if they were not measured."""
        return float(json.loads(self.file.read_text())["seconds_a_step"]) if self.file.is_file() else None

    def write(self, seconds: float) -> None:
        """Note them."""
        write_atomically(self.file, json.dumps({"seconds_a_step": seconds}) + "\n")
