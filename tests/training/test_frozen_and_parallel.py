"""Biases of an adapter that is not trained stay, and data parallelism by threads is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import nn
from transformers import TrainingArguments

from moelora import MoeLoraError, MoeLoraTrainer
from tests.adapters import adapted, assert_equal_tensors, router_biases, shake, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.training.runs import arguments, toy_rows

MOVING: dict[str, Any] = {"bias_update_rate": 0.1}


def loaded_frozen(folder: Path) -> Any:
    adapted("smora", **MOVING).save_pretrained(str(folder))
    return PeftModel.from_pretrained(tiny_model(), str(folder))


def frozen_by_hand(_: Path) -> Any:
    model = adapted("smora", **MOVING)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def frozen_beside_another(_: Path) -> Any:
    """Both are active, and only the other is trained, as when a new task is put on top of an old one."""
    model = adapted("smora", **MOVING)
    model.add_adapter("other", small_config("smora", **MOVING))
    shake(model)
    model.base_model.set_adapter(["default", "other"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            parameter.requires_grad_(False)
    return model


FROZEN: dict[str, Callable[[Path], Any]] = {
    "loaded": loaded_frozen,
    "by-hand": frozen_by_hand,
    "beside-another": frozen_beside_another,
}


@pytest.mark.parametrize("way", FROZEN)
def test_the_bias_of_a_frozen_adapter_stays(way: str, tmp_path: Path) -> None:
    model = FROZEN[way](tmp_path).train()
    before = router_biases(model)
    assert before
    for seed in range(2):
        model(**tiny_batch(seed=seed))
    assert_equal_tensors(router_biases(model), before)


def test_the_bias_of_the_adapter_beside_it_moves(tmp_path: Path) -> None:
    model = frozen_beside_another(tmp_path).train()
    before = router_biases(model, "other")
    model(**tiny_batch())
    assert all(not torch.equal(bias_E, before[name]) for name, bias_E in router_biases(model, "other").items())


def test_a_loaded_adapter_that_is_trained_on_moves_its_bias(tmp_path: Path) -> None:
    adapted("smora", **MOVING).save_pretrained(str(tmp_path))
    model = PeftModel.from_pretrained(tiny_model(), str(tmp_path), is_trainable=True).train()
    before = router_biases(model)
    model(**tiny_batch())
    assert all(not torch.equal(bias_E, before[name]) for name, bias_E in router_biases(model).items())


def test_a_bias_moves_while_only_the_routers_are_trained() -> None:
    model = adapted("smora", **MOVING).train()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("moelora_router" in name)
    before = router_biases(model)
    model(**tiny_batch())
    assert all(not torch.equal(bias_E, before[name]) for name, bias_E in router_biases(model).items())


class OfTwoGpus(TrainingArguments):
    """As on a machine with two GPUs and no launcher, where the Trainer wraps the model in nn.DataParallel."""

    @property
    def n_gpu(self) -> int:
        return 2


@pytest.mark.parametrize("preset", ["mixlora", "smora", "lora"])
def test_data_parallel_is_refused_when_the_trainer_is_built(preset: str) -> None:
    with pytest.raises(MoeLoraError, match=r"DataParallel.*(torchrun|accelerate|CUDA_VISIBLE_DEVICES)"):
        MoeLoraTrainer(model=adapted(preset), args=arguments(OfTwoGpus), train_dataset=toy_rows())


def test_a_replica_is_refused() -> None:
    """What nn.DataParallel runs: its buffers and records would be thrown away."""
    model = adapted("mixlora").train()
    replica = replicate(model)
    with pytest.raises(MoeLoraError, match="DataParallel"):
        replica(**tiny_batch())


def replicate(model: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` builds a replica, on the CPU."""
    modules = list(model.modules())
    copies = {module: module._replicate_for_data_parallel() for module in modules}
    for module, copy in copies.items():
        for name, child in module._modules.items():
            if child is not None:
                setattr(copy, name, copies[child])
        for name, parameter in module._parameters.items():
            if parameter is None:
                copy._parameters[name] = None
            else:
                setattr(copy, name, parameter.view_as(parameter))
    result: nn.Module = copies[model]
    return result
