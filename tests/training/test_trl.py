"""The trainers of TRL: supervised fine-tuning, preference optimisation, and the mixin in front of any other."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from torch import Tensor, nn
from trl import DPOConfig, KTOConfig, SFTConfig

from moelora import MoeLoraDPOTrainer, MoeLoraKTOTrainer, MoeLoraSFTTrainer, record_routing
from moelora.balance.losses import balance_losses
from moelora.balance.switch import SwitchBalance
from moelora.balance.z_loss import ZLoss
from tests.adapters import adapted, adapter_tensors, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import (
    Run,
    assert_same_gradients,
    assert_same_step,
    checkpointing_words,
    one_step,
    preference_rows,
    sft_rows,
    tiny_tokenizer,
    train,
)

# TRL's own deprecations, on paths of its own that must go on working here
DEPRECATED = pytest.mark.filterwarnings(
    "ignore:`compute_loss_func` is deprecated:FutureWarning",
    "ignore:`label_smoothing_factor` is deprecated:FutureWarning",
    "ignore:`gradient_checkpointing_(dis|en)able` is deprecated:FutureWarning",
)

BOTH = (SwitchBalance(), ZLoss())


BALANCED: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}


def sft_step(
    preset: str = "mixlora", *, words: dict[str, Any] | None = None, rows: Dataset | None = None, **settings: Any
) -> Run:
    trainer_words = {"processing_class": tiny_tokenizer(), **settings.pop("trainer_words", {})}
    return one_step(
        preset,
        sft_rows() if rows is None else rows,
        words=BALANCED if words is None else words,
        trainer_class=MoeLoraSFTTrainer,
        arguments_class=SFTConfig,
        trainer_words=trainer_words,
        **settings,
    )


def preference_step(
    model: Any = None,
    rows: Dataset | None = None,
    *,
    trainer: Any = MoeLoraDPOTrainer,
    config: Any = DPOConfig,
    **settings: Any,
) -> Run:
    return train(
        adapted("mixlora", **BALANCED) if model is None else model,
        preference_rows() if rows is None else rows,
        trainer_class=trainer,
        arguments_class=config,
        trainer_words={"processing_class": tiny_tokenizer()},
        **settings,
    )


@cache
def whole_sft() -> Run:
    return sft_step()


@cache
def whole_dpo() -> Run:
    return preference_step()


def test_sft_is_the_gradient_of_the_sum_of_the_losses() -> None:
    model = adapted("mixlora", **BALANCED).train()
    with record_routing(model) as recorder:
        task = model(**tiny_batch(batch_size=4)).loss
    balance, z = balance_losses(recorder.records, BOTH)
    (task + balance + 0.1 * z).backward()
    run = whole_sft()
    assert run.logs[0]["loss"] == pytest.approx((task + balance + 0.1 * z).item(), rel=1e-5)
    assert run.logs[0]["balance_loss"] == pytest.approx(balance.item(), rel=1e-5)
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_same_gradients(run.gradients[0], expected)


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize(("batch", "accumulate"), [(4, 1), (2, 2), (1, 4)], ids=["4x1", "2x2", "1x4"])
def test_sft_cuts_and_checkpointing(reentrant: bool | None, batch: int, accumulate: int) -> None:
    run = sft_step(batch=batch, accumulate=accumulate, **checkpointing_words(reentrant))
    assert_same_step(run, whole_sft())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_padding_free_equals_padded(accumulate: int) -> None:
    """One row of concatenated sequences without any mask: every token counts, and counting sees the same boundaries."""
    run = sft_step(padding_free=True, max_length=None, batch=4 // accumulate, accumulate=accumulate)
    assert_same_step(run, whole_sft())


def test_sft_packed_equals_padded() -> None:
    """All rows in one, as TRL packs them: each is a sequence of its own."""
    assert_same_step(sft_step(packing=True, max_length=64, batch=1), whole_sft())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_on_the_assistants_tokens_alone(accumulate: int) -> None:
    """Their labels are fewer, and the tokens that are balanced stay all."""
    masks = [[place % 3 == 0 for place in range(len(row["input_ids"]))] for row in sft_rows()]
    rows = Dataset.from_list(
        [{**row, "assistant_masks": list(map(int, mask))} for row, mask in zip(sft_rows(), masks, strict=True)]
    )
    run = sft_step(rows=rows, batch=4 // accumulate, accumulate=accumulate)
    batch = tiny_batch(batch_size=4)
    for labels, mask in zip(batch["labels"], masks, strict=True):
        labels[: len(mask)][~torch.tensor(mask)] = -100
    model = adapted("mixlora", **BALANCED)
    with torch.no_grad():
        task = model(**batch).loss.item()
    log, whole = run.logs[0], whole_sft().logs[0]
    assert log["balance_loss"] == pytest.approx(whole["balance_loss"], rel=1e-5)
    assert log["loss"] == pytest.approx(task + log["balance_loss"] + 0.1 * log["z_loss"], rel=1e-5)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_with_the_loss_dft(accumulate: int) -> None:
    cut: dict[str, Any] = {"batch": 4 // accumulate, "accumulate": accumulate, "loss_type": "dft"}
    log = sft_step(**cut).logs[0]
    pure = sft_step(words=BALANCED | {"balance_coef": 0.0, "z_loss_coef": 0.0}, **cut).logs[0]
    assert log["loss"] == pytest.approx(pure["loss"] + log["balance_loss"] + 0.1 * log["z_loss"], rel=1e-5)


def summed_loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    logits = outputs.logits[:, :-1].flatten(0, 1)
    total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
    return total / num_items_in_batch


TWO_FORWARDS: dict[str, dict[str, Any]] = {
    "own-loss": {"trainer_words": {"compute_loss_func": summed_loss}},
    "smoothing": {"label_smoothing_factor": 0.1},
}


@DEPRECATED
@pytest.mark.parametrize("kind", TWO_FORWARDS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_that_runs_two_forwards_counts_one(kind: str, accumulate: int) -> None:
    """With a loss of one's own TRL runs a second forward without gradients for its metrics."""
    settings = TWO_FORWARDS[kind]
    run = sft_step(batch=4 // accumulate, accumulate=accumulate, **settings)
    expected = whole_sft()
    for key, value in expected.logs[0].items():
        if key in ("balance_loss", "z_loss") or key.startswith("expert_load"):
            assert run.logs[0][key] == pytest.approx(value, rel=1e-5), key
    if kind == "own-loss":
        assert_same_gradients(run.gradients[0], expected.gradients[0])


@DEPRECATED
@pytest.mark.parametrize("kind", ["plain", *TWO_FORWARDS])
@pytest.mark.parametrize("reentrant", [None, True], ids=["plain", "reentrant"])
def test_sft_moves_the_bias_once_a_micro_batch(kind: str, reentrant: bool | None) -> None:
    run = sft_step(
        "smora",
        words={"bias_update_rate": 0.5, "balance_coef": 1.0},
        batch=2,
        accumulate=2,
        **TWO_FORWARDS.get(kind, {}),
        **checkpointing_words(reentrant),
    )
    before = adapter_tensors(adapted("smora", bias_update_rate=0.5))
    after = adapter_tensors(run.trainer.model)
    steps = torch.cat([(after[name] - before[name]) / 0.5 for name in after if name.endswith("router.default.bias")])
    assert set(steps.round().abs().tolist()) <= {0.0, 1.0, 2.0}
    assert 2.0 in steps.round().abs().tolist()


def test_sft_evaluates_without_the_balance_loss() -> None:
    rows = sft_rows()
    run = sft_step(
        words={"balance_coef": 100.0},
        trainer_words={"eval_dataset": rows},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    (log,) = [log for log in run.trainer.state.log_history if "eval_loss" in log]
    with torch.no_grad():
        expected = adapted("mixlora")(**tiny_batch(batch_size=4)).loss.item()
    assert log["eval_loss"] == pytest.approx(expected, rel=1e-4)


def test_sft_makes_the_adapter_itself() -> None:
    """The base model and a configuration, as in TRL's own examples."""
    run = train(
        tiny_model(),
        sft_rows(),
        trainer_class=MoeLoraSFTTrainer,
        arguments_class=SFTConfig,
        trainer_words={"processing_class": tiny_tokenizer(), "peft_config": small_config("mixlora", **BALANCED)},
    )
    assert run.logs[0]["balance_loss"] > 0


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_sft_resumes_bit_exactly(preset: str, tmp_path: Path) -> None:
    words: dict[str, Any] = {"bias_update_rate": 0.01} if preset == "smora" else {**BALANCED, "lora_dropout": 0.2}
    settings: dict[str, Any] = {"learning_rate": 1e-2, "batch": 2, "accumulate": 2, "lr_scheduler_type": "linear"}
    settings |= {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    settings |= {"trainer_class": MoeLoraSFTTrainer, "arguments_class": SFTConfig}
    tokenizer = tiny_tokenizer()
    straight = train(
        adapted(preset, **words),
        sft_rows(8),
        output_dir=str(tmp_path),
        trainer_words={"processing_class": tokenizer},
        **settings,
    )
    fresh = adapted(preset, seed=7, **words)
    resumed = MoeLoraSFTTrainer(
        model=fresh, args=straight.trainer.args, train_dataset=sft_rows(8), processing_class=tokenizer
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    expected, found = adapter_tensors(straight.trainer.model), adapter_tensors(fresh)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    for log, wanted in zip([log for log in resumed.state.log_history if "loss" in log], straight.logs, strict=True):
        assert log["loss"] == wanted["loss"]
        assert log.get("balance_loss") == wanted.get("balance_loss")


@DEPRECATED
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_dpo(reentrant: bool | None, accumulate: int) -> None:
    """The reference is the base model, run inside the same loss; only the policy's forward counts."""
    run = preference_step(batch=4 // accumulate, accumulate=accumulate, **checkpointing_words(reentrant))
    assert_same_step(run, whole_dpo())


def test_the_balance_loss_is_added_to_the_dpo_loss() -> None:
    log, pure = (
        whole_dpo().logs[0],
        preference_step(adapted("mixlora", **BALANCED | {"balance_coef": 0.0, "z_loss_coef": 0.0})).logs[0],
    )
    assert log["loss"] == pytest.approx(pure["loss"] + log["balance_loss"] + 0.1 * log["z_loss"], rel=1e-5)


def test_dpo_values() -> None:
    rows = preference_rows(1)
    run = preference_step(rows=rows, batch=1)
    tokenizer, model = tiny_tokenizer(), adapted("mixlora", **BALANCED)
    texts = [rows[0]["prompt"] + rows[0][key] + " w2" for key in ("chosen", "rejected")]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with record_routing(model) as recorder:
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    assert run.logs[0]["balance_loss"] == pytest.approx(balance_losses(recorder.records, BOTH)[0].item(), rel=1e-5)


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize(
    ("preset", "words"), [("smora", {"bias_update_rate": 0.1, "balance_coef": 1.0}), ("random_router", {})]
)
def test_dpo_of_an_adapter_that_is_its_own_reference(
    preset: str, words: dict[str, Any], precompute: bool, tmp_path: Path
) -> None:
    """Training an adapter on: TRL copies it to "ref", parameters only; frozen routers and biases must follow."""
    adapted(preset, **words).save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(tiny_model(), tmp_path, is_trainable=True)
    run = preference_step(model, batch=2, max_steps=2, learning_rate=1e-2, precompute_ref_log_probs=precompute)
    tensors, saved = adapter_tensors(model), adapter_tensors(adapted(preset, **words))
    for name, tensor in saved.items():
        assert torch.equal(tensors[name.replace(".default", ".ref")], tensor), name
    assert any(not torch.equal(tensors[name], tensor) for name, tensor in saved.items())
    # policy and reference are the same at first: the margin is 0
    balance = words.get("balance_coef", 0.0) * run.logs[0].get("balance_loss", 0.0)
    assert run.logs[0]["loss"] == pytest.approx(math.log(2) + balance, rel=1e-5)
    assert run.logs[0]["rewards/margins"] == pytest.approx(0, abs=1e-6)


@DEPRECATED
@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_kto(reentrant: bool | None) -> None:
    """Its loss runs forwards of other batches without gradients before and after the policy's."""
    rows = preference_rows(4)
    flat = [{"prompt": row["prompt"], "completion": row["chosen"], "label": i % 2 == 0} for i, row in enumerate(rows)]
    data = Dataset.from_list(flat)

    def step(**settings: Any) -> Run:
        return preference_step(None, data, trainer=MoeLoraKTOTrainer, config=KTOConfig, **settings)

    run = step(**checkpointing_words(reentrant))
    assert run.logs[0]["balance_loss"] > 0
    assert_same_step(run, step())


@pytest.mark.parametrize("accumulate", [1, 2])
def test_sft_padding_free_equals_padded_under_a_capacity(accumulate: int) -> None:
    """A row of concatenated sequences is several sequences to the capacity, in training and in counting."""
    words = {"balance_coef": 1.0, "expert_dropout": 0.0, "capacity_factor": 0.5, "lora_alpha": 0.3}
    run = sft_step(
        "sira", words=words, padding_free=True, max_length=None, batch=4 // accumulate, accumulate=accumulate
    )
    assert_same_step(run, sft_step("sira", words=words))
