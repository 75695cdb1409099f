"""One training run on a tiny model, and what came of it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from moelora import MoeLoraTrainer
from tests.adapters import adapted
from tests.conftest import VOCAB, tiny_batch

Rows = list[dict[str, Tensor]]
# Held by the process, so that its runs leave nothing behind.
_RUNS = tempfile.TemporaryDirectory(prefix="moelora-runs-")


def rows_of(batch: dict[str, Tensor]) -> Rows:
    """A dataset of the rows of a batch, padded as they are."""
    return [{key: value[i] for key, value in batch.items()} for i in range(len(batch["input_ids"]))]


def toy_rows(count: int = 4, **kwargs: Any) -> Rows:
    """Rows of unlike lengths, padded to one."""
    return rows_of(tiny_batch(batch_size=count, **kwargs))


def sft_rows(count: int = 4) -> Dataset:
    """The same rows without padding, as TRL takes them."""
    batch = tiny_batch(batch_size=count)
    rows = zip(batch["input_ids"], batch["attention_mask"].sum(1), strict=True)
    return Dataset.from_list([{"input_ids": ids[:n].tolist()} for ids, n in rows])


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the tiny models' vocabulary: token i is the word "w<i>"."""
    tokenizer = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w3"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="w0", bos_token="w1", eos_token="w2", unk_token="w3", padding_side="right"
    )


def preference_rows(count: int = 4) -> Dataset:
    generator = torch.Generator().manual_seed(0)

    def text(length: int) -> str:
        return " ".join(f"w{token}" for token in torch.randint(4, 97, (length,), generator=generator).tolist())

    return Dataset.from_list(
        [{"prompt": text(3 + i), "chosen": " " + text(4), "rejected": " " + text(6 - i % 3)} for i in range(count)]
    )


def arguments(cls: type[TrainingArguments] = TrainingArguments, **words: Any) -> TrainingArguments:
    """Training arguments for a short, quiet run on the CPU in the order of the rows, without clipping."""
    defaults: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(dir=_RUNS.name),
        "use_cpu": True,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "max_steps": 1,
        "max_grad_norm": 0.0,
        "train_sampling_strategy": "sequential",
        "lr_scheduler_type": "constant",
        "activation_checkpointing": False,
        "bf16": False,
    }
    return cls(**{**defaults, **words})


def checkpointing_words(reentrant: bool | None) -> dict[str, Any]:
    """Training arguments for one kind of gradient checkpointing, or none."""
    if reentrant is None:
        return {}
    return {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": reentrant}}


@dataclass
class GradientProbe(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    model: nn.Module
    steps: list[dict[str, Tensor]] = field(default_factory=list)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        named = self.model.named_parameters()
        self.steps.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})


@dataclass
class Run:
    """What came of a run.

    Attributes:
        trainer: The trainer, after training.
        gradients: The gradients of each optimizer step, by parameter.
        logs: The log of each step.
    """

    trainer: Any
    gradients: list[dict[str, Tensor]]
    logs: list[dict[str, Any]]


def train(
    model: Any,
    rows: Any,
    trainer_class: type[Any] = MoeLoraTrainer,
    *,
    batch: int = 4,
    accumulate: int = 1,
    arguments_class: type[TrainingArguments] = TrainingArguments,
    trainer_words: dict[str, Any] | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    **words: Any,
) -> Run:
    """Train `model` on `rows`, by default one step with learning rate 0."""
    settings = {"learning_rate": 0.0, "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
    probe = GradientProbe(model)
    trainer = trainer_class(
        model=model,
        args=arguments(arguments_class, **{**settings, **words}),
        train_dataset=rows,
        callbacks=[probe, *callbacks],
        **(trainer_words or {}),
    )
    trainer.train()
    return Run(trainer, probe.steps, [log for log in trainer.state.log_history if "loss" in log])


def one_step(preset: str, rows: Any = None, *, words: dict[str, Any] | None = None, **settings: Any) -> Run:
    """One step of a fresh tiny Llama with an adapter; the same arguments start from the same weights."""
    model = adapted(preset, **(words or {}))
    torch.manual_seed(0)
    return train(model, toy_rows() if rows is None else rows, **settings)


def assert_same_gradients(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-4) -> None:
    """Every gradient agrees within `tolerance` of its greatest element, and none is missing."""
    assert found.keys() == expected.keys()
    for name, grad in expected.items():
        error, scale = (found[name] - grad).abs().max().item(), grad.abs().max().item()
        assert error <= tolerance * scale + 1e-8, f"{name}: off by {error:.1e} where the greatest is {scale:.1e}"


def assert_same_step(found: Run, expected: Run, tolerance: float = 1e-4) -> None:
    """Loss, balance loss, load and every gradient of the two runs agree, and none is missing."""
    for got, wanted in zip(found.logs, expected.logs, strict=True):
        assert got.keys() == wanted.keys()
        for key, value in wanted.items():
            if key in ("loss", "balance_loss", "z_loss") or key.startswith("expert_load"):
                assert abs(got[key] - value) <= 1e-5 * max(1, abs(value)), f"{key}: {got[key]} instead of {value}"
    for step, wanted in zip(found.gradients, expected.gradients, strict=True):
        assert_same_gradients(step, wanted, tolerance)
