"""Trying one preset."""

from __future__ import annotations

import copy
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import ProgressCallback, TrainingArguments

from eval.speed.measure import batch, interleaved, peak_memory, step
from eval.speed.models import shared_copy
from eval.zoo.bases import HELD_OUT_SEED, MOE, TRAIN_SEED, Base, base_of, rows_of, tasks, tokenizer
from moelora import MoeLoraConfig, MoeLoraTrainer, batch_facts
from moelora.experts.shards import ShardExperts
from moelora.routing.run import find_hooks
from moelora.runs.parameters import count_parameters
from moelora.runs.trainer_arguments import trainer_arguments
from moelora.training.centroids import fit_unfitted
from train.sft import RunTrainer, set_dtype

HELD_OUT_ROWS = 12
BATCH = 8


@dataclass(frozen=True)
class Wishes:
    """How presets are tried.

    Args:
        steps: Optimizer steps of the training, of `BATCH` rows.
        rounds: Timed steps of each method.
        learning_rate: Of all presets alike: this is no place to compare scores.
    """

    steps: int = 24
    rounds: int = 5
    learning_rate: float = 2e-3


MOLA_LAYERS = [2] * 7 + [4] * 8 + [6] * 7 + [8] * 8
"""MoLA's experts by layer, 2, 4, 6 and 8 for a quarter each, where there are 30 layers as in SmolLM2."""


def config_of(preset: str, base: Base, **words: Any) -> MoeLoraConfig:
    """A preset at its defaults, but for what the words say, and for quarters of layers that four does not divide."""
    if preset == "mola":
        words = {"num_experts": MOLA_LAYERS, **words}
    return MoeLoraConfig.from_preset(preset, task_type=base.task_type, **words)


def lora_config(base: Base, r: int, dropout: float) -> LoraConfig:
    """PEFT's LoRA on every linear but the head; the experts of an MoE base are no linears, and PEFT would take them."""
    targets: Any = ["q_proj", "k_proj", "v_proj", "o_proj"] if base is MOE else "all-linear"
    return LoraConfig(r=r, lora_alpha=2 * r, lora_dropout=dropout, target_modules=targets, task_type=base.task_type)


def total_rank(model: Any) -> int | None:
    """Rows of the first factors of all experts of a linear, the most of any; None where experts have none.

    Shards are of pools for the whole model, of which a linear gets a LoRA of rank r.
    """
    experts = model.active_peft_config.experts
    if isinstance(experts, ShardExperts):
        return experts.r
    found = [math.prod(tensor.shape[:-1]) for name, tensor in model.named_parameters() if ".moelora_A." in f".{name}."]
    return max(found, default=None)


def equal_size(base: Any, kind: Base, wanted: int, dropout: float) -> int:
    """The rank at which a LoRA has as many trainable parameters as are wanted, at least 1."""
    one, two = (count_parameters(shared_copy(base), lora_config(kind, r, dropout)).trainable for r in (1, 2))
    return max(1, round((wanted - (2 * one - two)) / (two - one)))


class Bench:
    """The base model of a preset, with the rows that it is trained on.

    Args:
        kind: The base model's kind.
        wishes: How presets are tried.
        folder: Where trainers may write.
    """

    def __init__(self, kind: Base, wishes: Wishes, folder: str) -> None:
        self.kind, self.wishes, self.folder = kind, wishes, folder
        self.tokens = tokenizer()
        rows = math.ceil(wishes.steps * BATCH / len(tasks()))
        self.train = rows_of(kind, self.tokens, rows, TRAIN_SEED)
        self.held_out = rows_of(kind, self.tokens, HELD_OUT_ROWS, HELD_OUT_SEED)
        self.base = kind.make(self.tokens).requires_grad_(False)

    def ready(self, config: Any) -> Trained:
        """An adapter after one step, which is ready to be timed."""
        found = Trained(self, config, steps=1)
        found.trainer.train()
        return found


class Trained:
    """A model with an adapter and its trainer, on the bench's frozen weights.

    Args:
        bench: The base model and the rows.
        config: The adapter.
        steps: Optimizer steps; None for as many as are wished.
        seed: Of the adapter's weights and the order of the rows.
    """

    def __init__(self, bench: Bench, config: Any, *, steps: int | None = None, seed: int = 0) -> None:
        steps = steps or bench.wishes.steps
        torch.manual_seed(seed)
        adapted = get_peft_model(shared_copy(bench.base), config, autocast_adapter_dtype=False)
        self.model = set_dtype(adapted, "bfloat16")
        words = {
            "max_steps": steps,
            "per_device_train_batch_size": BATCH,
            "per_device_eval_batch_size": BATCH,
            "learning_rate": bench.wishes.learning_rate,
            "warmup_steps": max(1, steps // 6),
            "logging_steps": max(1, steps // 3),
            "save_strategy": "no",
            "report_to": "none",
            "dataloader_pin_memory": False,
            "seed": seed,
        }
        if bench.kind.is_classifier:
            trainer_class: Any = MoeLoraTrainer
            arguments: Any = TrainingArguments(bench.folder, **words)
        else:
            trainer_class, arguments = RunTrainer, trainer_arguments("sft", words, Path(bench.folder))
        self.trainer: Any = trainer_class(
            model=self.model,
            args=arguments,
            train_dataset=bench.train,
            eval_dataset=bench.held_out,
            processing_class=bench.tokens,
        )
        self.trainer.remove_callback(ProgressCallback)
        fit_unfitted(self.model, self.trainer.train_dataset)

    def batch(self) -> dict[str, Any]:
        """The first rows of the training."""
        found: dict[str, Any] = next(iter(self.trainer.get_train_dataloader()))
        return found

    def loss(self) -> float:
        """On the held-out rows, without balance losses."""
        return float(self.trainer.evaluate()["eval_loss"])

    def step(self, batch: Mapping[str, Any]) -> None:
        """Forward and backward as the trainer does them; gradients are dropped."""
        self.trainer.training_step(self.trainer.model, dict(batch))
        for parameter in self.model.parameters():
            parameter.grad = None

    def train(self, is_training: bool) -> None:
        """As `nn.Module.train`."""
        self.model.train(is_training)


def measure(preset: str, wishes: Wishes, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a preset, and time its step beside two LoRAs.

    Args:
        preset: Its name.
        wishes: How.
        say: Prints a line.

    Returns:
        What the table shows of it.
    """
    kind = base_of(preset)
    started = time.monotonic()
    config = config_of(preset, kind)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kind, wishes, folder)
        count = count_parameters(shared_copy(bench.base), copy.deepcopy(config))
        ours = Trained(bench, config)
        before = ours.loss()
        ours.trainer.train()
        after = ours.loss()
        say(f"loss {before:.3f} to {after:.3f}")
        dropout = getattr(config.experts, "lora_dropout", 0.0)
        ranks = {
            "equal_rank": total_rank(ours.model),
            "equal_size": equal_size(bench.base, kind, count.trainable, dropout),
        }
        peers = {
            name: bench.ready(lora_config(kind, rank, dropout)) for name, rank in ranks.items() if rank is not None
        }
        rows_of_step = ours.batch()
        seconds = interleaved(
            {"ours": ours, **peers},
            lambda each: each.step(rows_of_step),
            wishes.rounds,
            train=True,
            clock=time.process_time,
        )
    medians = {name: statistics.median(calls) for name, calls in seconds.items()}
    say("step " + ", ".join(f"{medians['ours'] / medians[name]:.2f} of LoRA r={ranks[name]}" for name in peers))
    peaks = {
        name: peak_memory(partial(build, preset, rank), _inputs(kind), step_with_tasks)
        for name, rank in {"ours": None, "equal_size": ranks["equal_size"]}.items()
    }
    return {
        "preset": preset,
        "base": kind.name,
        "trainable": count.trainable,
        "active": count.active,
        "total": count.base,
        "ranks": ranks,
        "step_seconds": {name: [round(each, 4) for each in calls] for name, calls in seconds.items()},
        "tokens_a_step": int(rows_of_step["attention_mask"].numel()),
        "peak_bytes": peaks,
        "loss_before": round(before, 4),
        "loss_after": round(after, 4),
        **_routing(ours),
        "seconds": round(time.monotonic() - started, 1),
    }


def _routing(trained: Trained) -> dict[str, Any]:
    """What the last log says of the routing."""
    logs = [entry for entry in trained.trainer.state.log_history if "loss" in entry]
    hooks = find_hooks(trained.model)
    experts = sum(hooks.mixtures().values()) if hooks is not None else 0
    return {
        "balance": logs[-1].get("balance_loss"),
        "dead": logs[-1].get("expert_load/dead"),
        "experts": experts if "expert_load/dead" in logs[-1] else None,
    }


def _inputs(kind: Base) -> dict[str, torch.Tensor]:
    """Eight rows of 128 tokens, with their tasks."""
    inputs = batch(BATCH * 128)
    numbers = torch.arange(BATCH) % len(tasks())
    return {**inputs, "task_ids": numbers, **({"labels": numbers} if kind.is_classifier else {})}


def step_with_tasks(inputs: Mapping[str, torch.Tensor]) -> Callable[[Any], None]:
    """A training step on rows whose tasks are known; see `eval.speed.measure.step`."""
    work = step({name: value for name, value in inputs.items() if name != "task_ids"})

    def run(model: Any) -> None:
        with batch_facts(task_ids=inputs["task_ids"]):
            work(model)

    return run


def build(preset: str, lora_rank: int | None) -> Any:
    """A preset, or a LoRA beside it, in the process that measures its memory."""
    kind = base_of(preset)
    base = kind.make(tokenizer()).requires_grad_(False)
    config: Any = config_of(preset, kind)
    if lora_rank is not None:
        config = lora_config(kind, lora_rank, getattr(config.experts, "lora_dropout", 0.0))
    model = set_dtype(get_peft_model(base, config, autocast_adapter_dtype=False), "bfloat16")
    fit_unfitted(model, [{"input_ids": row.tolist()} for row in torch.arange(10, 10 + 64 * 16).view(64, 16)])
    return model
