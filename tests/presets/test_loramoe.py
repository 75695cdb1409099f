"""LoRAMoE: MoLoRA on the feed-forward linears, and a balance by the tasks of the sequences, in training only."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model

from moelora import MoeLoraConfig, batch_facts, record_routing
from moelora.balance.localized import LocalizedBalance
from moelora.balance.losses import balance_losses
from moelora.balance.z_loss import ZLoss
from moelora.errors import ConfigError, TargetError
from moelora.ops.reference_losses import localized_balance_loss
from tests.adapters import adapted, adapter_tensors, gradients, outputs, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import Run, assert_same_step, checkpointing_words, rows_of, train

FEED_FORWARD = ["gate_proj", "up_proj", "down_proj"]
WORDS: dict[str, Any] = {"balance_coef": 1.0, "delta": 0.3, "lora_alpha": 0.3}


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("llama", {"gate_proj", "up_proj", "down_proj"}),
        ("phi", {"fc1", "fc2"}),
        ("phi3", {"gate_up_proj", "down_proj"}),
        ("t5", {"wi", "wo"}),
        ("bert", {"intermediate.dense", "output.dense"}),
    ],
)
def test_its_sites_are_the_feed_forward_linears(name: str, ends: set[str]) -> None:
    layers = tuner_layers(get_peft_model(tiny_model(name), small_config("loramoe", name)))
    assert {path.rpartition(".")[2] if name != "bert" else ".".join(path.split(".")[-2:]) for path in layers} == ends
    assert not any("attention" in path.lower() or "attn" in path for path in layers)
    assert len(layers) == {"llama": 6, "phi": 4, "phi3": 4, "t5": 8, "bert": 4}[name]
    for layer in layers.values():
        assert layer.routers["default"] is layer.moelora_router["default"]


def test_it_is_molora_on_those_linears() -> None:
    """Logits and gradients of the model's loss, with the same tensors."""
    ours = adapted("loramoe")
    molora = adapted("molora", target_modules=FEED_FORWARD, lora_alpha=32)
    assert adapter_tensors(ours).keys() == adapter_tensors(molora).keys()
    assert torch.equal(outputs(ours), outputs(molora))
    found, expected = gradients(ours), gradients(molora)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    assert (outputs(ours) - outputs(tiny_model())).abs().max() > 1e-3


def test_its_loss_is_the_reference_on_every_layer() -> None:
    model = adapted("loramoe", **WORDS, first_tasks=[2, 5]).train()
    tasks = torch.tensor([5, 0, 2])
    with batch_facts(task_ids=tasks), record_routing(model) as recorder:
        model(**tiny_batch())
    (found,) = balance_losses(recorder.records, [LocalizedBalance(coef=1.0, delta=0.3, first_tasks=[2, 5])])
    sequence_T = torch.arange(3).repeat_interleave(11)
    first_N = torch.tensor([True, False, True])
    naive = [localized_balance_loss(r.routing.probs_TE, sequence_T, first_N, r.valid_T, 0.3) for r in recorder.records]
    torch.testing.assert_close(found, torch.stack(naive).mean(), rtol=1e-5, atol=1e-7)


def run(batch: int = 4, accumulate: int = 1, tasks: tuple[int, ...] | None = (0, 1, 1, 0), **settings: Any) -> Run:
    """One step of a trainer on four rows."""
    rows = rows_of(tiny_batch(batch_size=4))
    if tasks is not None:
        rows = [{**row, "task_ids": torch.tensor(task)} for row, task in zip(rows, tasks, strict=True)]
    torch.manual_seed(0)
    return train(adapted("loramoe", **WORDS), rows, batch=batch, accumulate=accumulate, **settings)


def test_training_adds_it_and_tasks_matter() -> None:
    found, other = run(), run(tasks=(1, 0, 0, 1))
    assert found.logs[0]["balance_loss"] > 0
    assert found.logs[0]["balance_loss"] != other.logs[0]["balance_loss"]
    for name, grad in found.gradients[0].items():
        if "router" in name:
            assert not torch.allclose(grad, other.gradients[0][name], rtol=1e-3), name


@pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_checkpointing_changes_nothing(reentrant: bool) -> None:
    assert_same_step(run(**checkpointing_words(reentrant)), run())


def test_accumulation_is_the_weighted_mean_of_the_micro_batches() -> None:
    """As its docstring says: the loss is not linear in the tokens, each micro-batch is balanced by itself."""
    cut, whole = run(batch=2, accumulate=2), run()
    model = adapted("loramoe", **WORDS).train()
    batch, tasks = tiny_batch(batch_size=4), torch.tensor([0, 1, 1, 0])
    values, sizes = [], []
    for part in (slice(0, 2), slice(2, 4)):
        with batch_facts(task_ids=tasks[part]), record_routing(model) as recorder:
            model(**{key: value[part] for key, value in batch.items()})
        values.append(balance_losses(recorder.records, model.peft_config["default"].balance)[0].item())
        sizes.append(int(batch["attention_mask"][part].sum()))
    mean = sum(value * size for value, size in zip(values, sizes, strict=True)) / sum(sizes)
    assert cut.logs[0]["balance_loss"] == pytest.approx(mean, rel=1e-5)
    assert cut.logs[0]["balance_loss"] != pytest.approx(whole.logs[0]["balance_loss"], rel=1e-3)


def test_training_without_tasks_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="the batch has no task_ids; allowed: one number for each sequence"):
        run(tasks=None)


def test_generation_and_evaluation_need_no_tasks() -> None:
    model = adapted("loramoe")
    assert model.peft_config["default"].needs == frozenset()
    assert model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False).shape[1] >= 4
    assert outputs(model).isfinite().all()


def test_its_words() -> None:
    config = MoeLoraConfig.from_preset("loramoe", balance_coef=0.5, delta=0.2, first_tasks=[3, 4])
    assert config.balance == [LocalizedBalance(coef=0.5, delta=0.2, first_tasks=[3, 4])]
    assert config.balance[0].needs == {"task_ids"}
    assert MoeLoraConfig.from_preset("loramoe", first_tasks=[]).balance[0].first_tasks == []
    assert MoeLoraConfig.from_preset("loramoe", balance_coef=0.0).balance == []
    assert MoeLoraConfig.from_preset("loramoe", balance_coef=0.0, z_loss_coef=0.3).balance == [ZLoss(coef=0.3)]
    with pytest.raises(TargetError, match="plays one of the parts gate, up, down"):
        get_peft_model(tiny_model(), small_config("loramoe", target_modules=["q_proj"]))
