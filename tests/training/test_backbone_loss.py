"""Losses that call the backbone below the wrapper (chunked cross-entropy, reward heads), or no model at all."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import Trainer

from moelora import MoeLoraError, MoeLoraTrainer, MoeLoraTrainerMixin
from tests.adapters import adapted, router_biases
from tests.training.runs import Run, assert_same_gradients, one_step

BALANCED: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}


class ChunkedLoss(Trainer):
    """Cross-entropy from the hidden states, as chunked losses work it out: the model's own forward is never run."""

    def compute_loss(
        self, model: Any, inputs: Any, *args: Any, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Tensor:
        base = model.get_base_model()
        hidden = base.base_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        logits, labels = base.lm_head(hidden)[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten()
        total = nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")
        return total / num_items_in_batch


class MoeLoraChunkedLoss(MoeLoraTrainerMixin, ChunkedLoss):
    """As a user would write it."""


class WithoutModel(Trainer):
    """A penalty on the weights alone."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
        return torch.stack([p.square().sum() for p in model.parameters() if p.requires_grad]).sum()


class MoeLoraWithoutModel(MoeLoraTrainerMixin, WithoutModel):
    """As a user would write it."""


def step(trainer_class: type[Any], preset: str = "mixlora", **settings: Any) -> Run:
    words = BALANCED | ({"expert_dropout": 0.0, "capacity_factor": 1.0} if preset == "sira" else {})
    return one_step(preset, words=words, trainer_class=trainer_class, **settings)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_a_loss_of_the_backbone_gets_its_balance_loss(preset: str, accumulate: int) -> None:
    run = step(MoeLoraChunkedLoss, preset, batch=4 // accumulate, accumulate=accumulate)
    whole = step(MoeLoraTrainer, preset)
    for key in ("balance_loss", "z_loss", "expert_load/busiest"):
        assert run.logs[0][key] == pytest.approx(whole.logs[0][key], rel=1e-5), key
    assert_same_gradients(run.gradients[0], whole.gradients[0])


def test_smora_moves_its_bias_with_a_loss_of_the_backbone() -> None:
    words: dict[str, Any] = {"bias_update_rate": 0.1}
    found = router_biases(one_step("smora", words=words, trainer_class=MoeLoraChunkedLoss).trainer.model)
    expected = router_biases(one_step("smora", words=words).trainer.model)
    before = router_biases(adapted("smora", **words))
    assert any(not torch.equal(bias_E, before[name]) for name, bias_E in expected.items())
    for name, bias_E in expected.items():
        assert torch.equal(found[name], bias_E), name


def test_a_step_without_any_record_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """No mixture has run, so there is nothing to balance: an error, or one warning."""
    said = ""
    with caplog.at_level(logging.WARNING, "moelora"):
        try:
            step(MoeLoraWithoutModel, max_steps=3)
        except MoeLoraError as error:
            said = str(error)
    warnings = [record for record in caplog.records if record.name.startswith("moelora")]
    assert len(warnings) == (0 if said else 1)
    assert "balance" in said or "balance" in warnings[0].getMessage()


def test_evaluation_and_a_step_of_an_adapter_without_balance_say_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        one_step("mixlora", words={"balance_coef": 0.0}, trainer_class=MoeLoraWithoutModel)
        one_step("lora", trainer_class=MoeLoraWithoutModel)
    assert not [record for record in caplog.records if record.name.startswith("moelora")]
