"""A base that carries an adapter already (a notebook cell run twice) is refused, and the adapter keeps its weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

from moelora.errors import MoeLoraError
from tests.adapters import (
    adapted,
    adapter_tensors,
    assert_equal_tensors,
    outputs,
    small_config,
    snapshot,
    train_steps,
)
from tests.conftest import tiny_model

PRESETS = ("mixlora", "sira", "smora", "lora")
WAYS: dict[str, Callable[[Any, Any], Any]] = {
    "the PeftModel": get_peft_model,
    "its base": lambda model, config: get_peft_model(model.get_base_model(), config),
    "the PeftModel, another name": lambda model, config: get_peft_model(model, config, adapter_name="other"),
    "its base, another name": lambda model, config: get_peft_model(
        model.get_base_model(), config, adapter_name="other"
    ),
}


def saved(model: Any, folder: Path) -> dict[str, Any]:
    model.save_pretrained(str(folder))
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("second", ["the same", "another"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_second_wrap_is_refused(preset: str, second: str, way: str, tmp_path: Path) -> None:
    model = adapted(preset)
    expected, tensors, before = outputs(model), adapter_tensors(model), snapshot(model)
    file = saved(model, tmp_path / "before")
    assert file
    config = small_config(preset if second == "the same" else "molora")
    with pytest.raises(MoeLoraError, match=r"already.*(add_adapter|load_adapter|unload)"):
        WAYS[way](model, config)
    assert snapshot(model) == before
    assert_equal_tensors(adapter_tensors(model), tensors)
    assert torch.equal(outputs(model), expected)
    assert_equal_tensors(saved(model, tmp_path / "after"), file)
    train_steps(model)
    model.save_pretrained(str(tmp_path / "trained"))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path / "trained"))
    assert torch.equal(outputs(loaded), outputs(model))
    assert not torch.equal(outputs(loaded), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("preset", ["mixlora", "sira"])
def test_loading_onto_a_wrapped_model_is_refused(preset: str, tmp_path: Path) -> None:
    model = adapted(preset)
    expected, before = outputs(model), snapshot(model)
    model.save_pretrained(str(tmp_path))
    with pytest.raises(MoeLoraError, match="already.*load_adapter"):
        PeftModel.from_pretrained(model, str(tmp_path))
    assert snapshot(model) == before
    assert torch.equal(outputs(model), expected)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_a_base_wrapped_by_another_method_is_refused() -> None:
    """Also where the two methods have no linear in common: the file of the second would hold the first one's names."""
    model = get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    before = snapshot(model)
    with pytest.raises(MoeLoraError, match=r"already.*unload"):
        get_peft_model(model, small_config("sira", target_modules=["v_proj"]))
    assert snapshot(model) == before


@pytest.mark.parametrize("preset", PRESETS)
def test_after_unloading_the_base_can_be_wrapped_again(preset: str, tmp_path: Path) -> None:
    model = get_peft_model(adapted(preset).unload(), small_config(preset))
    train_steps(model)
    assert saved(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert torch.equal(outputs(loaded), outputs(model))
