"""A model that is wrapped already is not wrapped again; further adapters are added to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from safetensors.torch import load_file
from torch import nn

from moelora.errors import TargetError
from tests.adapters import adapted, adapter_tensors, assert_equal_tensors, outputs, small_config, snapshot, tuner_layers
from tests.conftest import tiny_model

pytestmark = pytest.mark.filterwarnings(
    "ignore:You are trying to modify a model with PEFT for a second time",
    "ignore:Already found a `peft_config` attribute",
)


class Holder(nn.Module):
    """A model with a part that is a PEFT model."""

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.out = part, nn.Linear(3, 3)


def wrapped(kind: str) -> Any:
    """The model to be wrapped again."""
    if kind == "a PeftModel":
        return adapted("mixlora")
    if kind == "its base":
        return adapted("sira").get_base_model()
    if kind == "its tuner":
        return adapted("sira").base_model
    if kind == "a part":
        return Holder(adapted("sira"))
    if kind == "a LoRA":
        return get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"]))
    if kind == "transformers' adapter":
        model = tiny_model()
        model.add_adapter(small_config("sira"))
        return model
    model = adapted("sira")
    model.delete_adapter("default")
    return model.base_model.model


KINDS = ["a PeftModel", "its base", "its tuner", "a part", "a LoRA", "transformers' adapter", "an empty wrapping"]


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_second_wrap_is_refused_and_the_model_unchanged(kind: str, preset: str) -> None:
    model = wrapped(kind)
    before, tensors = snapshot(model), adapter_tensors(model)
    names = list(getattr(model, "peft_config", {}))
    for adapter_name in ("default", "second"):
        with pytest.raises(TargetError, match=r"add_adapter.*unload\(\)"):
            get_peft_model(model, small_config(preset), adapter_name=adapter_name)
        assert snapshot(model) == before
        assert_equal_tensors(adapter_tensors(model), tensors)
        assert list(getattr(model, "peft_config", {})) == names


def test_loading_over_an_adapter_is_refused(tmp_path: Path) -> None:
    model = adapted("sira")
    model.save_pretrained(str(tmp_path))
    before, expected = snapshot(model), outputs(model)
    with pytest.raises(TargetError, match="carries an adapter"):
        PeftModel.from_pretrained(model.get_base_model(), str(tmp_path))
    with pytest.raises(TargetError, match="the model is in a .* already"):
        PeftModel.from_pretrained(model, str(tmp_path))
    with pytest.raises(TargetError, match="the model is in a .* already"):
        inject_adapter_in_model(small_config("sira"), model, "second")
    assert snapshot(model) == before
    assert torch.equal(outputs(model), expected)


def test_further_adapters_of_a_peft_model(tmp_path: Path) -> None:
    model = adapted("sira")
    model.save_pretrained(str(tmp_path))
    model.add_adapter("second", small_config("sira"))
    model.load_adapter(str(tmp_path), adapter_name="third")
    model.set_adapter("third")
    assert set(model.peft_config) == {"default", "second", "third"}
    model.set_adapter("default")
    expected = outputs(model)
    model.set_adapter("third")
    assert torch.equal(outputs(model), expected)
    model.save_pretrained(str(tmp_path / "all"))
    stored = [load_file(str(path)) for path in sorted((tmp_path / "all").rglob("*.safetensors"))]
    assert len(stored) == 3
    assert all(len(tensors) == len(stored[0]) > 0 for tensors in stored)


@pytest.mark.parametrize("way", ["transformers", "inject"])
def test_further_adapters_of_a_bare_model(way: str, tmp_path: Path) -> None:
    adapted("sira", adapter_name="saved").save_pretrained(str(tmp_path))
    model = tiny_model()
    for name in ("first", "second"):
        if way == "transformers":
            model.add_adapter(small_config("sira"), name)
        else:
            inject_adapter_in_model(small_config("sira"), model, name)
    if way == "transformers":
        model.load_adapter(str(tmp_path / "saved"), "third")
    held = {name for layer in tuner_layers(model).values() for name in layer.moelora_A}
    assert held == {"first", "second"} | ({"third"} if way == "transformers" else set())


def test_after_unloading_it_can_be_wrapped_again(tmp_path: Path) -> None:
    model = get_peft_model(adapted("mixlora").unload(), small_config("sira"))
    model.save_pretrained(str(tmp_path))
    assert len(load_file(str(tmp_path / "adapter_model.safetensors"))) == 14 * 3
