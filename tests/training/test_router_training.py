"""Routers in groups of their own: their rate, their first steps, and a run that is resumed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import TrainerCallback
from trl import SFTConfig

from moelora import MoeLoraSFTTrainer, MoeLoraTrainer, RouterTraining
from moelora.errors import ConfigError
from moelora.runs.config import load_config
from tests.adapters import adapted, adapter_tensors
from tests.runs.tiny import write_run
from tests.training.runs import Run, arguments, sft_rows, tiny_tokenizer, toy_rows, train


class Rates(TrainerCallback):
    """The rate of every trained parameter in each step."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {id(p): name for name, p in model.named_parameters()}
        self.steps: list[dict[str, float]] = []

    def on_pre_optimizer_step(self, *args: Any, optimizer: Any = None, **kwargs: Any) -> None:
        groups = optimizer.param_groups
        self.steps.append({self.names[id(p)]: group["lr"] for group in groups for p in group["params"]})

    def of(self, routers: bool) -> list[float]:
        """The one rate in each step of all routers, or of all else."""
        found = [{r for name, r in step.items() if ("moelora_router" in name) == routers} for step in self.steps]
        assert all(len(rates) == 1 for rates in found)
        return [rate for rates in found for rate in rates]


def trained(preset: str = "mixlora", words: RouterTraining | None = None, **settings: Any) -> tuple[Run, Rates]:
    model = adapted(preset)
    rates = Rates(model)
    more = {"router_training": words, **settings.pop("trainer_words", {})}
    settings = {"learning_rate": 0.01, "max_steps": 4, "callbacks": [rates], **settings}
    return train(model, toy_rows(4), trainer_words=more, **settings), rates


@pytest.mark.parametrize("preset", ["mixlora", "adamole", "smora"])
def test_routers_have_their_rate_and_nothing_else_has(preset: str) -> None:
    run, rates = trained(preset, RouterTraining(learning_rate=0.5), lr_scheduler_type="linear")
    linear = [1, 0.75, 0.5, 0.25]
    assert rates.of(routers=True) == pytest.approx([0.5 * share for share in linear])
    assert rates.of(routers=False) == pytest.approx([0.01 * share for share in linear])
    assert set(rates.steps[0]) == {name for name, p in run.trainer.model.named_parameters() if p.requires_grad}
    assert [log["router_learning_rate"] for log in run.logs] == pytest.approx([0.5 * share for share in linear])
    assert [log["learning_rate"] for log in run.logs] == pytest.approx([0.01 * share for share in linear])


def test_groups_keep_their_settings() -> None:
    """Weight decay above all, which biases and norms have none of."""
    run, _ = trained("adamole", RouterTraining(learning_rate=0.5), weight_decay=0.1)
    names = {id(p): name for name, p in run.trainer.model.named_parameters()}
    decay = {names[id(p)]: g["weight_decay"] for g in run.trainer.optimizer.param_groups for p in g["params"]}
    assert {value for name, value in decay.items() if name.endswith("default.weight")} == {0.1}
    assert {value for name, value in decay.items() if name.endswith("threshold_bias")} == {0.0}
    assert all(group["params"] for group in run.trainer.optimizer.param_groups)


def test_the_same_rate_trains_the_same() -> None:
    found = [adapter_tensors(trained(words=words)[0].trainer.model) for words in (None, RouterTraining())]
    assert all(torch.equal(found[0][name], tensor) for name, tensor in found[1].items())


def test_the_first_steps_of_routers() -> None:
    words = RouterTraining(learning_rate=0.5, frozen_steps=2, warmup_steps=2)
    run, rates = trained(words=words, max_steps=6, lr_scheduler_type="linear", weight_decay=0.1)
    of_routers = [0, 0, 0.5 * 4 / 6 / 2, 0.5 * 3 / 6, 0.5 * 2 / 6, 0.5 * 1 / 6]
    assert rates.of(routers=True) == pytest.approx(of_routers)
    assert rates.of(routers=False) == pytest.approx([0.01 * n / 6 for n in (6, 5, 4, 3, 2, 1)])
    assert [log["router_learning_rate"] for log in run.logs] == pytest.approx(of_routers)


def test_a_rate_of_zero_freezes() -> None:
    before = adapter_tensors(adapted("mixlora"))
    run, _ = trained(words=RouterTraining(frozen_steps=4), weight_decay=0.1)
    for name, tensor in adapter_tensors(run.trainer.model).items():
        assert torch.equal(tensor, before[name]) == ("moelora_router" in name), name


@pytest.mark.parametrize(("frozen", "warmup"), [(0, 0), (0, 1), (3, 0), (0, 4), (2, 3)])
def test_the_factor(frozen: int, warmup: int) -> None:
    words = RouterTraining(frozen_steps=frozen, warmup_steps=warmup)
    ramp = [n / warmup for n in range(1, warmup + 1)]
    assert [words.factor(step) for step in range(8)] == ([0.0] * frozen + ramp + [1.0] * 8)[:8]


def test_with_lora_plus() -> None:
    """Its optimizer is the user's: A, B and routers have three rates."""
    model = adapted("mixlora")
    rates = Rates(model)
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)
    words = {"router_training": RouterTraining(learning_rate=0.5), "optimizers": (optimizer, None)}
    train(model, toy_rows(4), trainer_words=words, callbacks=[rates])
    for name, rate in rates.steps[0].items():
        expected = 0.5 if "moelora_router" in name else 16e-3 if "moelora_B" in name else 1e-3
        assert rate == pytest.approx(expected), name


def test_with_trl_and_a_second_call_of_train() -> None:
    model = adapted("mixlora")
    rates = Rates(model)
    args = arguments(SFTConfig, max_steps=2, learning_rate=0.01, max_length=32)
    trainer = MoeLoraSFTTrainer(
        model=model,
        args=args,
        train_dataset=sft_rows(4),
        processing_class=tiny_tokenizer(),
        callbacks=[rates],
        router_training=RouterTraining(learning_rate=0.5, frozen_steps=1),
    )
    trainer.train()
    trainer.train()
    assert rates.of(routers=True) == [0.0, 0.5] * 2
    assert rates.of(routers=False) == [0.01] * 4


def test_resuming_is_bit_exact(tmp_path: Path) -> None:
    words = RouterTraining(learning_rate=0.05, frozen_steps=1, warmup_steps=3)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "lr_scheduler_type": "cosine"}
    settings["output_dir"] = str(tmp_path)
    straight, rates = trained(words=words, max_steps=5, **settings)
    fresh = adapted("mixlora", seed=7)
    again = Rates(fresh)
    resumed = MoeLoraTrainer(
        model=fresh,
        args=straight.trainer.args,
        train_dataset=toy_rows(4),
        callbacks=[again],
        router_training=words,
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.steps == rates.steps[2:]
    for name, tensor in adapter_tensors(straight.trainer.model).items():
        assert torch.equal(adapter_tensors(fresh)[name], tensor), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"learning_rate": -1.0}, r"router_training\.learning_rate is -1\.0; allowed: a number of at least 0, or None"),
        ({"learning_rate": float("nan")}, r"router_training\.learning_rate is nan"),
        ({"frozen_steps": -1}, r"router_training\.frozen_steps is -1"),
        ({"warmup_steps": 1.5}, r"router_training\.warmup_steps is 1\.5"),
    ],
)
def test_values_out_of_range_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        RouterTraining(**words)


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ConfigError, match="has no tensor of a router; allowed: None"):
        train(adapted("random_router"), toy_rows(4), trainer_words={"router_training": RouterTraining()})
    with pytest.raises(ConfigError, match="multiply a schedule by step, and the trainer has a ReduceLROnPlateau"):
        trained(
            words=RouterTraining(warmup_steps=1),
            lr_scheduler_type="reduce_lr_on_plateau",
            eval_strategy="steps",
            trainer_words={"eval_dataset": toy_rows(4)},
        )
    model = adapted("mixlora")
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    words = {"router_training": RouterTraining(), "optimizers": (optimizer, scheduler)}
    with pytest.raises(ConfigError, match=r"given a scheduler that was made before; allowed: optimizers=\(optimizer"):
        train(model, toy_rows(4), trainer_words=words)


def test_a_run_says_it_in_its_file(tmp_path: Path) -> None:
    file = write_run(tmp_path, router_training={"learning_rate": 0.05, "frozen_steps": 1})
    assert load_config(file).router_training == RouterTraining(learning_rate=0.05, frozen_steps=1)
    with pytest.raises(ConfigError, match=r"router_training\.frozen_steps is -1"):
        load_config(file, ["router_training.frozen_steps=-1"])
    with pytest.raises(Exception, match="router_training is given with recipe 'sequential'; allowed: none"):
        load_config(file, ["recipe=sequential"])
