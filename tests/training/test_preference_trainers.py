"""TRL's own trainers: a reference that is the policy at first, and batches whose routing cannot be counted ahead."""

from __future__ import annotations

import logging
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

from moelora import MoeLoraTrainerMixin
from tests.adapters import adapted
from tests.conftest import tiny_model
from tests.training.runs import arguments, tiny_tokenizer, train

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says that they are experimental
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig, ORPOTrainer


def preferences(count: int = 4) -> Dataset:
    rows = [{"prompt": f"w{4 + i} w9", "chosen": f" w{5 + i} w7", "rejected": f" w{6 + i} w8"} for i in range(count)]
    return Dataset.from_list(rows)


# --- a plain DPOTrainer that continues a trained adapter: TRL copies it to "ref", parameters only ---

CONTINUED: dict[str, tuple[str, dict[str, Any]]] = {
    "smora": ("smora", {"bias_update_rate": 0.1}),
    "random_router": ("random_router", {}),
    "mixlora": ("mixlora", {"balance_coef": 0.0, "lora_dropout": 0.2}),
    # without its capacity, which holds in training only, and a precomputed reference runs in evaluation
    "sira": ("sira", {"balance_coef": 0.0, "expert_dropout": 0.5, "lora_dropout": 0.2, "capacity_factor": None}),
    "molora": ("molora", {}),
}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("case", CONTINUED)
def test_the_reference_of_a_plain_dpo_trainer_is_the_trained_adapter(
    case: str, precompute: bool, tmp_path: Path
) -> None:
    """Policy and reference are the same at the first step: margin 0 and loss ln 2."""
    preset, words = CONTINUED[case]
    adapted(preset, **words).save_pretrained(tmp_path)
    run = train(
        PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True),
        preferences(),
        DPOTrainer,
        arguments_class=DPOConfig,
        trainer_words={"processing_class": tiny_tokenizer()},
        precompute_ref_log_probs=precompute,
    )
    assert run.logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)
    assert run.logs[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# --- accumulation in trainers that make the model's inputs inside their loss ---


class MoeLoraORPO(MoeLoraTrainerMixin, ORPOTrainer):
    """As a user would write it."""


class MoeLoraCPO(MoeLoraTrainerMixin, CPOTrainer):
    """As a user would write it."""


class MoeLoraGRPO(MoeLoraTrainerMixin, GRPOTrainer):
    """As a user would write it."""


def shortest(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


REINFORCED = Dataset.from_list([{"prompt": f"w{4 + i} w9"} for i in range(8)])
TRAINERS: dict[str, tuple[Any, Any, Dataset, dict[str, Any], dict[str, Any]]] = {
    "orpo": (MoeLoraORPO, ORPOConfig, preferences(8), {}, {}),
    "cpo": (MoeLoraCPO, CPOConfig, preferences(8), {}, {}),
    "grpo": (
        MoeLoraGRPO,
        GRPOConfig,
        REINFORCED,
        {"reward_funcs": shortest},
        {"num_generations": 2, "max_completion_length": 5, "generation_batch_size": 4},
    ),
}
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def made(kind: str, accumulate: int, **words: Any) -> Any:
    """The trainer, before the first step."""
    trainer_class, config_class, rows, trainer_words, settings = TRAINERS[kind]
    torch.manual_seed(0)
    model = adapted("mixlora", **words)
    return trainer_class(
        model=model,
        args=arguments(
            config_class,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=accumulate,
            learning_rate=0.0,
            max_steps=2,
            **settings,
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer(),
        **trainer_words,
    )


def steps(trainer: Any) -> list[dict[str, Any]]:
    torch.manual_seed(1)
    trainer.train()
    return [log for log in trainer.state.log_history if "loss" in log]


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in caplog.records if record.name.startswith("moelora")]
    return [message for message in found if "micro_batch" in message]


@QUIET
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_default_scope_falls_back_with_one_warning(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        trainer = made(kind, accumulate=2, balance_coef=1.0)
        logs = steps(trainer)
    assert len(said(caplog)) == 1
    assert len(logs) == 2
    caplog.clear()
    with caplog.at_level(logging.WARNING, "moelora"):
        expected = steps(made(kind, accumulate=2, balance_coef=1.0, balance_scope="micro_batch"))
    assert said(caplog) == []
    for log, wanted in zip(logs, expected, strict=True):
        assert log["balance_loss"] == pytest.approx(wanted["balance_loss"], rel=1e-6)
        assert log["loss"] == pytest.approx(wanted["loss"], rel=1e-6)


@QUIET
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_configuration_keeps_the_scope_that_was_asked_for(kind: str) -> None:
    """Another trainer can keep to it; the fall-back is of this run."""
    trainer = made(kind, accumulate=2, balance_coef=1.0)
    before = trainer.model.peft_config["default"].to_dict()
    steps(trainer)
    assert trainer.model.peft_config["default"].to_dict() == before


@QUIET
@pytest.mark.parametrize("kind", TRAINERS)
@pytest.mark.parametrize("words", [{"balance_coef": 1.0}, {"balance_coef": 0.0}], ids=["one-batch", "no-balance"])
def test_nothing_is_said_without_cause(kind: str, words: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        logs = steps(made(kind, accumulate=1 if words["balance_coef"] else 2, **words))
    assert said(caplog) == []
    assert ("balance_loss" in logs[0]) == bool(words["balance_coef"])
