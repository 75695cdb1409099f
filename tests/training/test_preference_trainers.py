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
from torch.nn import functional as F
from trl import DPOConfig, DPOTrainer, GRPOConfig

from moelora import MoeLoraGRPOTrainer, MoeLoraORPOTrainer, MoeLoraTrainerMixin
from moelora.errors import ConfigError
from tests.adapters import adapted
from tests.conftest import tiny_model
from tests.training.runs import (
    GradientProbe,
    arguments,
    assert_same_gradients,
    checkpointing_words,
    tiny_tokenizer,
    train,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # TRL says that they are experimental
    from trl.experimental.cpo import CPOConfig, CPOTrainer
    from trl.experimental.orpo import ORPOConfig


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


class MoeLoraCPO(MoeLoraTrainerMixin, CPOTrainer):
    """As a user would write it."""


def shortest(completions: list[str], **_: Any) -> list[float]:
    return [float(len(set(text.split()))) for text in completions]


REINFORCED = Dataset.from_list([{"prompt": f"w{4 + i} w9"} for i in range(8)])
TRAINERS: dict[str, tuple[Any, Any, Dataset, dict[str, Any], dict[str, Any]]] = {
    "orpo": (MoeLoraORPOTrainer, ORPOConfig, preferences(8), {}, {}),
    "cpo": (MoeLoraCPO, CPOConfig, preferences(8), {}, {}),
    "grpo": (
        MoeLoraGRPOTrainer,
        GRPOConfig,
        REINFORCED,
        {"reward_funcs": shortest},
        {"num_generations": 2, "max_completion_length": 5, "generation_batch_size": 4},
    ),
}
QUIET = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")


def made(kind: str, accumulate: int, changes: dict[str, Any] | None = None, **words: Any) -> Any:
    """The trainer, before the first step; `changes` are of its arguments, `words` of the adapter."""
    trainer_class, config_class, rows, trainer_words, settings = TRAINERS[kind]
    torch.manual_seed(0)
    model = adapted("mixlora", **words)
    return trainer_class(
        model=model,
        args=arguments(
            config_class,
            gradient_accumulation_steps=accumulate,
            **{"per_device_train_batch_size": 2, "learning_rate": 0.0, "max_steps": 2, **settings, **(changes or {})},
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


@QUIET
@pytest.mark.parametrize("kind", TRAINERS)
def test_the_balance_loss_is_added_once(kind: str) -> None:
    """Whatever forwards a step has: those that generate, and those of a reference, do not count."""
    logs, pure = (
        steps(made(kind, 2, {"beta": 0.1, "max_steps": 1}, balance_coef=coef, balance_scope="micro_batch"))
        for coef in (1.0, 0.0)
    )
    assert logs[0]["balance_loss"] > 0.9
    assert logs[0]["loss"] == pytest.approx(pure[0]["loss"] + logs[0]["balance_loss"], rel=1e-5)


@QUIET
@pytest.mark.parametrize("kind", ["orpo", "grpo"])
def test_checkpointing_changes_no_gradient(kind: str) -> None:
    def step(reentrant: bool | None) -> Any:
        trainer = made(kind, 1, {"max_steps": 1, "beta": 0.1, **checkpointing_words(reentrant)}, balance_coef=1.0)
        probe = GradientProbe(trainer.model)
        trainer.add_callback(probe)
        return steps(trainer)[0], probe.steps[0]

    expected, gradients = step(None)
    for reentrant in (False, True):
        log, found = step(reentrant)
        assert log["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert_same_gradients(found, gradients)


@QUIET
def test_orpo_has_the_loss_of_its_paper() -> None:
    """Equations 6 and 7 of 2403.07691; TRL's cross-entropy is that of prompt and chosen answer."""
    trainer = made("orpo", 1, {"max_steps": 1, "per_device_train_batch_size": 8}, balance_coef=0.0)
    nll, count, odds = 0.0, 0, []
    for row in trainer.train_dataset:
        means = []
        for answer in ("chosen", "rejected"):
            ids, labels = (torch.tensor(row[f"{answer}_{key}"]) for key in ("input_ids", "labels"))
            with torch.no_grad():
                logits = trainer.model(input_ids=ids[None]).logits[0, :-1]
            logps = logits.log_softmax(-1).gather(1, ids[1:, None])[:, 0]
            means.append(logps[labels[1:] != -100].mean())
            if answer == "chosen":
                nll, count = nll - logps.sum().item(), count + len(logps)
        chosen, rejected = ((mean.exp() / (1 - mean.exp())).log() for mean in means)
        odds.append(F.logsigmoid(chosen - rejected).item())
    expected = nll / count - trainer.args.beta * sum(odds) / len(odds)
    assert steps(trainer)[0]["loss"] == pytest.approx(expected, rel=1e-4)


@QUIET
def test_vllm_is_refused_before_it_starts() -> None:
    with pytest.raises(ConfigError, match="use_vllm is True; allowed: False. vLLM is given the weights"):
        made("grpo", 1, {"use_vllm": True})


@QUIET
def test_grpo_refuses_facts_that_it_would_lose() -> None:
    trainer = made("grpo", 1, {"max_steps": 1})
    trainer.train_dataset = REINFORCED.add_column("task_ids", list(range(8)))
    with pytest.raises(ConfigError, match="the rows have task_ids, and the trainer .GRPO. makes the model's inputs"):
        trainer.train()
