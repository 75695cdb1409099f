"""The loss of two forwards that draw other experts: value and gradients, in every trainer that has labels."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor
from trl import DPOConfig, DPOTrainer, SFTConfig

from moelora import MoeLoraConfig, MoeLoraSFTTrainer, MoeLoraTrainerMixin, balance_losses, record_routing
from moelora.balance.consistency import Consistency
from moelora.errors import ConfigError
from moelora.ops import reference
from tests.adapters import adapted, gradients, shake, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close
from tests.ops.compare import gradients as gradients_of
from tests.training.draws import DRAWS, fixed_draws
from tests.training.runs import (
    Run,
    assert_same_gradients,
    preference_rows,
    rows_of,
    sft_rows,
    tiny_tokenizer,
    train,
)
from train.sft import RunTrainer


def labelled(name: str, logits: Tensor, labels: Tensor) -> Tensor:
    """Position by position: where something is predicted, and what a model of one stack predicts is the next token."""
    if name == "bert":
        return logits
    ahead = 1 if name == "llama" else 0
    rows = [
        logits[b, s] for b in range(len(labels)) for s in range(labels.shape[1] - ahead) if labels[b, s + ahead] != -100
    ]
    return torch.stack(rows)


NO_DROPOUT: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "t5": {"dropout_rate": 0.0},
    "bert": {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0},
}


def thor(name: str) -> Any:
    """A tiny model in which nothing is drawn but experts."""
    model = get_peft_model(tiny_model(name, **NO_DROPOUT[name]), small_config("thor", name, consistency_coef=1.7))
    shake(model)
    return model.train()


def draws_of(name: str) -> tuple[int, ...]:
    """A T5 has four blocks in a forward."""
    return DRAWS if name != "t5" else tuple(itertools.chain.from_iterable((d, d) for d in DRAWS))


def naive(model: Any, name: str, batch: dict[str, Tensor], coef: float) -> tuple[Tensor, Tensor]:
    """The model's own loss of a first forward, and the divergence of two more."""
    loss = model(**batch).loss
    first, second = (labelled(name, model(**batch).logits, batch["labels"]) for _ in range(2))
    compared = reference.consistency_loss(first, second)
    return loss + coef * compared, compared


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "bert"])
def test_value_and_gradients_equal_the_naive_loss(name: str) -> None:
    of_stack = "llama" if name == "gpt2" else name
    batch = tiny_batch(name, batch_size=4)
    with fixed_draws(draws_of(name)):
        run = train(thor(name), rows_of(batch))
    with fixed_draws(draws_of(name)):
        model = thor(name)
        loss, compared = naive(model, of_stack, batch, 1.7)
    if name == "gpt2":
        # transformers counts the first label of a row too, of models whose loss has no name, and divides by that
        counted = (batch["labels"][:, 1:] != -100).sum() / (batch["labels"] != -100).sum()
        loss, compared = loss * counted, compared * counted
    loss.backward()
    assert compared > 1e-4
    assert run.logs[0]["consistency_loss"] == pytest.approx(compared.item(), rel=1e-4)
    assert run.logs[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
    expected = {key: p.grad for key, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(run.gradients[0], expected, 1e-4)


def test_the_operation_equals_its_reference() -> None:
    leaves = {"first": (3 * torch.randn(5, 11)).requires_grad_(), "second": torch.randn(5, 11).requires_grad_()}
    found = gradients_of(
        lambda: Consistency(coef=1.0).compared(**{f"{k}_NV": v for k, v in leaves.items()}) / 5, leaves
    )
    expected = gradients_of(lambda: reference.consistency_loss(leaves["first"], leaves["second"]), leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-6)


def step(rows: Any, **settings: Any) -> Run:
    with fixed_draws():
        return train(adapted("thor"), rows, **settings)


@pytest.mark.parametrize("batch", [1, 2])
def test_accumulation_changes_nothing(batch: int) -> None:
    rows = rows_of(tiny_batch(batch_size=4))
    whole, cut = step(rows), step(rows, batch=batch, accumulate=4 // batch)
    assert_same_gradients(cut.gradients[0], whole.gradients[0], 1e-4)
    for key in ("loss", "consistency_loss"):
        assert cut.logs[0][key] == pytest.approx(whole.logs[0][key], rel=1e-5)


@pytest.mark.parametrize("trainer", [MoeLoraSFTTrainer, RunTrainer])
def test_trainers_that_fuse_the_head_have_the_same(trainer: type[Any]) -> None:
    plain = step(rows_of(tiny_batch(batch_size=4)))
    words: dict[str, Any] = {
        "trainer_words": {"processing_class": tiny_tokenizer()},
        "arguments_class": SFTConfig,
    }
    fused = step(sft_rows(), trainer_class=trainer, **words)
    assert_same_gradients(fused.gradients[0], plain.gradients[0], 1e-4)
    for key in ("loss", "consistency_loss"):
        assert fused.logs[0][key] == pytest.approx(plain.logs[0][key], rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    """With real draws, which a repeated layer repeats."""
    found = []
    for checkpointing in (False, True):
        words: dict[str, Any] = (
            {"activation_checkpointing_kwargs": {"use_reentrant": reentrant}} if checkpointing else {}
        )
        rows = rows_of(tiny_batch(batch_size=4))
        found.append(train(adapted("thor"), rows, activation_checkpointing=checkpointing, **words))
    assert_same_gradients(found[1].gradients[0], found[0].gradients[0])
    assert found[1].logs[0]["consistency_loss"] == pytest.approx(found[0].logs[0]["consistency_loss"], rel=1e-5)
    assert found[0].logs[0]["consistency_loss"] > 1e-4


def test_it_is_not_in_the_evaluation_loss_and_off_without_a_coefficient() -> None:
    rows = rows_of(tiny_batch(batch_size=4))
    model = adapted("thor", consistency_coef=100.0)
    words: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}
    run = train(model, rows, trainer_words={"eval_dataset": rows}, **words)
    (log,) = [log for log in run.trainer.state.log_history if "eval_loss" in log]
    with torch.no_grad():
        assert log["eval_loss"] == pytest.approx(model.eval()(**tiny_batch(batch_size=4)).loss.item(), rel=1e-5)
    without = train(adapted("thor", consistency_coef=0.0), rows)
    assert "consistency_loss" not in without.logs[0]
    assert "expert_load/busiest" in without.logs[0]


class MoeLoraDPOTrainer(MoeLoraTrainerMixin, DPOTrainer):
    """As a user would write it."""


def test_batches_without_labels_are_refused() -> None:
    words: dict[str, Any] = {
        "trainer_class": MoeLoraDPOTrainer,
        "arguments_class": DPOConfig,
        "trainer_words": {"processing_class": tiny_tokenizer()},
    }
    with pytest.raises(ConfigError, match=r"batches of MoeLoraDPOTrainer are not inputs of the model with labels"):
        train(adapted("thor"), preference_rows(), **words)
    train(adapted("thor", consistency_coef=0.0), preference_rows(), **words)


def test_records_of_routing_do_not_have_it() -> None:
    model = adapted("thor").train()
    with record_routing(model) as recorder:
        gradients(model)
    balance = model.peft_config["default"].balance
    with pytest.raises(ConfigError, match="'consistency', which compares what two forwards predict"):
        balance_losses(recorder.records, balance)


def test_it_needs_no_trained_router() -> None:
    words: dict[str, Any] = {"scores": "constant", "selection": "draw"}
    assert MoeLoraConfig(balance=Consistency(coef=0.5), **words).has_balance_loss
    with pytest.raises(ConfigError, match="no loss of routing with a router that is not trained"):
        MoeLoraConfig(balance=[Consistency(coef=0.5), {"kind": "switch", "coef": 0.1}], **words)
    with pytest.raises(ConfigError, match="consistency_coef is -1; allowed: a number of at least 0"):
        Consistency(coef=-1)
