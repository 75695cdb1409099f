"""What the trainers log, leave out, refuse and resume."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback

from moelora import MoeLoraTrainer, MoeLoraTrainerMixin, record_routing
from moelora.balance.losses import balance_losses
from moelora.balance.switch import SwitchBalance
from moelora.balance.z_loss import ZLoss
from moelora.errors import ConfigError
from moelora.training.metrics import load_metrics
from tests.adapters import adapted, adapter_tensors, shake, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import Run, one_step, toy_rows, train

SUMMARY = {"balance_loss", "z_loss", "expert_load/busiest", "expert_load/entropy", "expert_load/dead"}

BOTH = (SwitchBalance(), ZLoss())


class Printed(TrainerCallback):
    """What the callbacks (progress bar, wandb, ...) are given to show."""

    def __init__(self) -> None:
        self.logs: list[dict[str, Any]] = []

    def on_log(self, *args: Any, logs: dict[str, Any], **kwargs: Any) -> None:
        self.logs.append(dict(logs))


def test_load_metrics() -> None:
    assert load_metrics(torch.tensor([2.0, 2.0, 2.0, 2.0])) == pytest.approx({"busiest": 0.25, "entropy": 1, "dead": 0})
    assert load_metrics(torch.tensor([0.0, 7.0, 0.0])) == pytest.approx(
        {"busiest": 1, "entropy": 0, "dead": 2}, abs=1e-6
    )
    assert load_metrics(torch.tensor([1.0, 3.0]))["entropy"] == pytest.approx(
        -(0.25 * math.log(0.25) + 0.75 * math.log(0.75)) / math.log(2)
    )
    assert load_metrics(torch.tensor([5.0])) == pytest.approx({"busiest": 1, "entropy": 0, "dead": 0})
    assert load_metrics(torch.zeros(3))["busiest"] == 0


def test_the_log_shows_a_summary_and_the_history_every_layer() -> None:
    printed = Printed()
    run = one_step("mixlora", words={"balance_coef": 0.3}, callbacks=[printed])
    assert {key for key in printed.logs[0] if key in SUMMARY or "expert_load" in key} == SUMMARY
    by_layer = {key for key in run.logs[0] if key.startswith("expert_load/model")}
    assert by_layer == {
        f"expert_load/model.layers.{i}.mlp/{name}" for i in (0, 1) for name in ("busiest", "entropy", "dead")
    }
    assert all(isinstance(value, float) for key, value in run.logs[0].items() if key in by_layer | SUMMARY)


def layer_values(run: Run, name: str) -> list[float]:
    return [value for key, value in run.logs[0].items() if key.startswith("expert_load/model") and key.endswith(name)]


def test_the_values_of_the_log() -> None:
    run = one_step("mixlora", words={"balance_coef": 0.3})
    model = adapted("mixlora").train()
    with record_routing(model) as recorder:
        model(**tiny_batch(batch_size=4))
    expected = [load_metrics(record.counts_E()) for record in recorder.records]
    for name in ("busiest", "entropy", "dead"):
        assert layer_values(run, name) == pytest.approx([metrics[name] for metrics in expected])
        total = sum(metrics[name] for metrics in expected)
        assert run.logs[0][f"expert_load/{name}"] == pytest.approx(total if name == "dead" else total / 2)
    balance, z = balance_losses(recorder.records, BOTH)
    assert run.logs[0]["balance_loss"] == pytest.approx(balance.item())
    assert run.logs[0]["z_loss"] == pytest.approx(z.item())


def test_tensorboard_reads_the_balance_losses_and_the_load(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = toy_rows(8)
    one_step(
        "mixlora",
        rows,
        words={"balance_coef": 0.3},
        max_steps=2,
        output_dir=str(tmp_path),
        report_to=["tensorboard"],
    )
    (written,) = tmp_path.rglob("events.out.tfevents.*")
    events = EventAccumulator(str(written.parent)).Reload()
    model = adapted("mixlora").train()
    for step in (1, 2):
        with record_routing(model) as recorder:
            model(**{key: torch.stack([row[key] for row in rows[4 * step - 4 : 4 * step]]) for key in rows[0]})
        loads = [load_metrics(record.counts_E()) for record in recorder.records]
        balance, z = balance_losses(recorder.records, BOTH)
        expected = {
            "balance_loss": balance.item(),
            "z_loss": z.item(),
            "expert_load/busiest": sum(load["busiest"] for load in loads) / len(loads),
            "expert_load/entropy": sum(load["entropy"] for load in loads) / len(loads),
            "expert_load/dead": sum(load["dead"] for load in loads),
        }
        assert expected.keys() == SUMMARY
        for name, value in expected.items():
            found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
            assert found.keys() == {1, 2}
            assert found[step] == pytest.approx(value, rel=1e-5), (name, step)


def test_a_log_of_several_steps_is_their_mean() -> None:
    rows = toy_rows(8)
    run = one_step("mixlora", rows, words={"balance_coef": 0.3}, max_steps=2, logging_steps=2, batch=2, accumulate=2)
    parts = [one_step("mixlora", part, words={"balance_coef": 0.3}) for part in (rows[:4], rows[4:])]
    assert len(run.logs) == 1
    for key in ("loss", "balance_loss", "z_loss"):
        assert run.logs[0][key] == pytest.approx(sum(part.logs[0][key] for part in parts) / 2, rel=1e-5)


def test_without_a_coefficient_only_the_load_is_logged() -> None:
    run = one_step("molora")
    assert SUMMARY & set(run.logs[0]) == {key for key in SUMMARY if key.startswith("expert_load")}


def test_the_balance_loss_is_not_in_the_evaluation_loss() -> None:
    model = adapted("mixlora", balance_coef=100.0)
    rows = toy_rows()
    run = train(
        model,
        rows,
        trainer_words={"eval_dataset": rows},
        eval_strategy="steps",
        eval_steps=1,
        per_device_eval_batch_size=4,
    )
    (log,) = [log for log in run.trainer.state.log_history if "eval_loss" in log]
    with torch.no_grad():
        expected = model.eval()(**tiny_batch(batch_size=4)).loss.item()
    assert log["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert run.logs[0]["loss"] > expected + 50
    assert not SUMMARY & set(log)


def test_a_plain_trainer_works_without_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        plain = one_step("mixlora", words={"balance_coef": 1.0}, trainer_class=Trainer, max_steps=3)
    assert [record.name for record in caplog.records].count("moelora.routing.run") == 1
    without = one_step("mixlora", words={"balance_coef": 0.0}, max_steps=3)
    for found, expected in zip(plain.gradients, without.gradients, strict=True):
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    assert not SUMMARY & set(plain.logs[0])


def test_moelora_trainer_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        one_step("mixlora", words={"balance_coef": 1.0}, batch=2, accumulate=2)
    assert caplog.records == []


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_model_without_a_moelora_adapter(kind: str) -> None:
    model = tiny_model()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    run = train(model, toy_rows(), learning_rate=1e-3, max_steps=2, batch=2, accumulate=2)
    assert len(run.logs) == 2
    assert not any("expert_load" in key or key in SUMMARY for key in run.logs[0])


def test_an_adapter_without_routing() -> None:
    """The control "lora" has nothing to balance and nothing to log."""
    run = one_step("lora", batch=2, accumulate=2)
    assert not any("expert_load" in key or key in SUMMARY for key in run.logs[0])
    assert run.gradients[0]


def test_an_adapter_of_transformers_own_integration() -> None:
    """`model.add_adapter` injects into the model itself; there is no PeftModel around it."""
    model = tiny_model()
    model.add_adapter(small_config("mixlora", balance_coef=1.0))
    shake(model)
    torch.manual_seed(0)
    run = train(model, toy_rows(), batch=2, accumulate=2)
    expected = one_step("mixlora", words={"balance_coef": 1.0})
    assert run.logs[0]["balance_loss"] == pytest.approx(expected.logs[0]["balance_loss"], rel=1e-5)
    for name, grad in expected.gradients[0].items():
        found = run.gradients[0][name.removeprefix("base_model.model.")]
        torch.testing.assert_close(found, grad, rtol=1e-4, atol=5e-5)


class Pairs(MoeLoraTrainerMixin, Trainer):
    """A trainer whose batches are not inputs of its model, as in reinforcement learning."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(model, {**inputs["first"], **inputs["second"]}, *args, **kwargs)


def as_pairs(rows: list[dict[str, Tensor]]) -> dict[str, Any]:
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    return {"first": {"input_ids": batch.pop("input_ids")}, "second": batch}


def test_batches_that_cannot_be_counted_are_balanced_each_alone(caplog: pytest.LogCaptureFixture) -> None:
    settings: dict[str, Any] = {"trainer_class": Pairs, "trainer_words": {"data_collator": as_pairs}}
    settings["remove_unused_columns"] = False
    with caplog.at_level(logging.WARNING, "moelora"):
        counted = one_step("mixlora", words={"balance_coef": 1.0}, batch=2, accumulate=2, max_steps=2, **settings)
    assert len(caplog.records) == 1
    assert "Pairs accumulates gradients" in caplog.text
    alone = one_step("mixlora", words={"balance_coef": 1.0}, **settings)
    assert alone.logs[0]["balance_loss"] > 0
    parts = one_step(
        "mixlora", words={"balance_coef": 1.0, "balance_scope": "micro_batch"}, batch=2, accumulate=2, **settings
    )
    assert parts.logs[0]["balance_loss"] == counted.logs[0]["balance_loss"] > 0
    one_step("mixlora", words={"balance_coef": 0.0}, batch=2, accumulate=2, **settings)


def test_active_adapters_must_agree_on_the_balance() -> None:
    model = adapted("mixlora", balance_coef=1.0)
    model.add_adapter("other", small_config("mixlora", balance_coef=2.0))
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(ConfigError, match="different balance settings"):
        train(model, toy_rows())
    model.base_model.set_adapter(["other"])
    assert train(model, toy_rows()).logs[0]["balance_loss"] > 0


def test_two_active_adapters_are_balanced_each() -> None:
    """Expert 3 of one adapter has nothing to do with expert 3 of another; here they differ in number too."""
    model = adapted("mixlora", balance_coef=1.0)
    model.add_adapter("other", small_config("mixlora", balance_coef=1.0, num_experts=7))
    shake(model, seed=3)
    model.base_model.set_adapter(["default", "other"])
    with record_routing(model) as recorder:
        model(**tiny_batch(batch_size=4))
    alone = [balance_losses([record], BOTH)[0] for record in recorder.records]
    whole = train(model, toy_rows())
    parts = train(model, toy_rows(), batch=1, accumulate=4)
    for run in (whole, parts):
        assert run.logs[0]["balance_loss"] == pytest.approx(sum(loss.item() for loss in alone) / 4, rel=1e-5)
        for adapter in ("default", "other"):
            assert f"expert_load/model.layers.0.mlp/{adapter}/busiest" in run.logs[0]
    for name, grad in whole.gradients[0].items():
        torch.testing.assert_close(parts.gradients[0][name], grad, rtol=1e-4, atol=5e-5)


class Tally:
    """A loss of one's own, normalised over the accumulated batch as `compute_loss_func` has to."""

    def __call__(self, outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs.logits[:, :-1].flatten(0, 1)
        total = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=-100, reduction="sum")
        return total / num_items_in_batch


@pytest.mark.parametrize(
    "settings",
    [{"label_smoothing_factor": 0.1}, {"trainer_words": {"compute_loss_func": Tally()}}],
    ids=["smoothing", "own"],
)
def test_other_losses_are_cut_alike(settings: dict[str, Any]) -> None:
    words = {"balance_coef": 1.0}
    whole = one_step("mixlora", words=words, **settings)
    parts = one_step("mixlora", words=words, batch=1, accumulate=4, **settings)
    for name, grad in whole.gradients[0].items():
        torch.testing.assert_close(parts.gradients[0][name], grad, rtol=1e-4, atol=5e-5)


RESUMED: dict[str, dict[str, Any]] = {
    "mixlora": {"balance_coef": 0.1, "lora_dropout": 0.2},
    "smora": {"bias_update_rate": 0.01},
    "sira": {"balance_coef": 0.1},
}


@pytest.mark.parametrize("preset", RESUMED)
def test_resuming_is_bit_exact(preset: str, tmp_path: Path) -> None:
    """Four steps, against two and a resumption: parameters, buffers, losses and balance losses."""
    settings: dict[str, Any] = {"learning_rate": 1e-2, "batch": 2, "accumulate": 2, "lr_scheduler_type": "linear"}
    settings |= {"train_sampling_strategy": "random", "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    rows = toy_rows(8)
    straight = train(adapted(preset, **RESUMED[preset]), rows, output_dir=str(tmp_path), **settings)
    checkpoint = tmp_path / "checkpoint-2"
    assert checkpoint.is_dir()
    fresh = adapted(preset, seed=7, **RESUMED[preset])
    resumed = MoeLoraTrainer(model=fresh, args=straight.trainer.args, train_dataset=rows)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    expected = adapter_tensors(straight.trainer.model)
    found = adapter_tensors(fresh)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    logs = [log for log in resumed.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log, wanted in zip(logs, straight.logs, strict=True):
        assert log == {**wanted, **{key: log[key] for key in log if "runtime" in key}}
    if preset == "smora":
        assert any(tensor.abs().max() > 0 for name, tensor in found.items() if name.endswith("router.default.bias"))


def test_the_best_model_comes_back_at_the_end(tmp_path: Path) -> None:
    rows = toy_rows(4)
    settings: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "eval_loss", "greater_is_better": True}
    model = adapted("smora", bias_update_rate=0.01)
    before = adapter_tensors(model)
    run = train(
        model,
        rows,
        max_steps=3,
        learning_rate=1e-2,
        trainer_words={"eval_dataset": rows},
        output_dir=str(tmp_path),
        **settings,
    )
    # the loss falls, and the greatest is asked for
    assert run.trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-1")
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "checkpoint-1" / "adapter_model.safetensors")
    after = adapter_tensors(model)
    for name, tensor in after.items():
        assert torch.equal(saved[name.replace(".default", "")], tensor), name
        assert not torch.equal(before[name], tensor) or "bias" in name
