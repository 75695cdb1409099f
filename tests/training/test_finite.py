"""Training that goes wrong stops with its step and batch, and saves nothing that is no number."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from moelora import MoeLoraTrainer
from moelora.errors import TrainingError
from tests.adapters import adapted
from tests.training.runs import arguments, tiny_tokenizer, toy_rows


class Poison(TrainerCallback):
    """Spoils a weight before a step."""

    def __init__(self, step: int, value: float) -> None:
        self.step, self.value = step, value

    def on_step_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step:
            weight = next(p for name, p in model.named_parameters() if p.requires_grad and "moelora_A" in name)
            weight.data.view(-1)[0] = self.value


def trainer(place: Path, *callbacks: TrainerCallback, cls: type[MoeLoraTrainer] = MoeLoraTrainer, **words: Any) -> Any:
    args = arguments(output_dir=str(place), **{"save_strategy": "steps", "save_steps": 1, "max_steps": 3, **words})
    return cls(
        model=adapted("sira").train(),
        args=args,
        train_dataset=toy_rows(4),
        processing_class=tiny_tokenizer(),
        callbacks=list(callbacks),
    )


def checkpoints(place: Path) -> list[str]:
    return sorted(path.name for path in place.glob("checkpoint-*"))


def test_a_loss_that_is_no_number_names_step_and_batch(tmp_path: Path) -> None:
    words: dict[str, Any] = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    running = trainer(tmp_path, Poison(1, float("nan")), **words)
    message = r"the loss is nan in step 2, batch 1 of the step \(2 rows of 11 tokens, the first begins with 'w37 w24 "
    with pytest.raises(TrainingError, match=message):
        running.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]


class SecondBatch(MoeLoraTrainer):
    """The loss of the second micro-batch of a step is infinite."""

    seen = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.seen += 1
        return loss / 0 if self.seen == 2 else loss


def test_the_batch_is_counted_within_its_step(tmp_path: Path) -> None:
    words: dict[str, Any] = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 3}
    with pytest.raises(TrainingError, match="the loss is inf in step 1, batch 2 of the step"):
        trainer(tmp_path, cls=SecondBatch, **words).train()
    assert checkpoints(tmp_path) == []


class Steep(MoeLoraTrainer):
    """A finite loss with an infinite gradient."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        loss.register_hook(lambda grad: grad * float("inf"))
        return loss


@pytest.mark.parametrize("clipped", [0.0, 1.0])
def test_a_gradient_that_is_no_number_changes_no_weight(tmp_path: Path, clipped: float) -> None:
    running = trainer(tmp_path, cls=Steep, max_grad_norm=clipped)
    before = {name: p.detach().clone() for name, p in running.model.named_parameters()}
    with pytest.raises(TrainingError, match=r"the gradient's norm is (nan|inf) in step 1, with a finite loss"):
        running.train()
    assert all(torch.equal(p, before[name]) for name, p in running.model.named_parameters())


def test_weights_that_are_no_numbers_are_not_saved(tmp_path: Path) -> None:
    class Explode(TrainerCallback):
        def on_optimizer_step(self, args: Any, state: Any, control: Any, model: nn.Module, **kwargs: Any) -> None:
            if state.global_step == 1:
                weight = next(p for p in model.parameters() if p.requires_grad)
                weight.data.fill_(float("inf"))

    running = trainer(tmp_path, Explode())
    with pytest.raises(TrainingError, match=r"moelora_\S+ holds NaN or infinity after step 2, so it is not saved"):
        running.train()
    assert checkpoints(tmp_path) == ["checkpoint-1"]
    with pytest.raises(TrainingError, match="so it is not saved"):
        running.save_model(str(tmp_path / "last"))
    assert not (tmp_path / "last").exists()
