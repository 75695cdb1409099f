"""Several adapters on one model: adding, switching, combining, deleting, one for each sample."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from moelora import undo
from moelora.errors import AdapterNameError
from tests.adapters import adapted, adapter_tensors, outputs, shake, small_config, tuner_layers, two_adapters
from tests.conftest import tiny_batch, tiny_model


def alone(model: Any, name: str) -> Tensor:
    """Outputs of one of several adapters, from a model that has no other."""
    config = copy.deepcopy(model.peft_config[name])
    only = get_peft_model(tiny_model(), config, adapter_name=name).eval()
    set_peft_model_state_dict(only, get_peft_model_state_dict(model, adapter_name=name), adapter_name=name)
    return outputs(only)


def test_adding_an_adapter_leaves_the_active_one_alone() -> None:
    model = adapted("mixlora", adapter_name="first")
    before, trainable = outputs(model), {name for name, p in model.named_parameters() if p.requires_grad}
    model.add_adapter("second", small_config("mixlora", num_experts=6, r=2))
    assert model.active_adapters == ["first"]
    assert torch.equal(outputs(model), before)
    assert {name for name, p in model.named_parameters() if p.requires_grad} == trainable


def test_adding_an_adapter_notes_nothing_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """To be able to undo it: else the hundredth takes many times as long as the second."""
    noted: list[Any] = []

    class Counted(undo._Attributes):
        def __init__(self, owner: Any) -> None:
            noted.append(owner)
            super().__init__(owner)

    monkeypatch.setattr(undo, "_Attributes", Counted)
    model = get_peft_model(tiny_model(), small_config("sira"))
    counts = []
    for index in range(3):
        noted.clear()
        model.add_adapter(f"further{index}", small_config("sira"))
        counts.append(len(noted))
    assert set(counts) == {len({id(owner) for owner in noted})}


def test_an_adapter_takes_the_mode_of_the_model() -> None:
    # PEFT's layers start in training mode whatever the model is in; expert dropout and capacity would be on
    model = get_peft_model(tiny_model(), small_config("sira", lora_dropout=0.5))
    assert torch.equal(outputs(model), outputs(model))
    assert not any(
        module.training for module in model.get_base_model().modules() if not isinstance(module, nn.ModuleDict)
    )
    model.train()
    model.add_adapter("second", small_config("sira"))
    assert all(layer.moelora_router["second"].training for layer in tuner_layers(model).values())


def test_switching() -> None:
    model = two_adapters()
    expected = {name: alone(model, name) for name in ("first", "second")}
    assert not torch.equal(expected["first"], expected["second"])
    for name in ("second", "first"):
        model.set_adapter(name)
        assert torch.equal(outputs(model), expected[name])
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable
        assert all(f".{name}." in parameter for parameter in trainable)
    with pytest.raises(ValueError, match="third"):
        model.set_adapter("third")


def test_several_active_adapters_add_their_changes() -> None:
    model = adapted("sira", adapter_name="first", target_modules=["v_proj"], layers_to_transform=[1])
    model.add_adapter("second", small_config("sira", num_experts=3, target_modules=["v_proj"], layers_to_transform=[1]))
    shake(model, seed=2)
    model.eval().base_model.set_adapter(["first", "second"])
    path = "model.layers.1.self_attn.v_proj"
    layer, x = tuner_layers(model)[path], torch.randn(2, 3, 36)
    base = layer.base_layer(x)
    both = layer(x) - base
    parts = []
    for name in ("first", "second"):
        model.base_model.set_adapter(name)
        parts.append(layer(x) - base)
    torch.testing.assert_close(both, parts[0] + parts[1], atol=1e-5, rtol=1e-5)


def test_several_active_feed_forward_adapters_add_their_changes() -> None:
    model = two_adapters()
    model.base_model.set_adapter(["first", "second"])
    layer, x = tuner_layers(model)["model.layers.1.mlp"], torch.randn(2, 3, 36)
    base, both = layer.base_layer(x), layer(x)
    parts = []
    for name in ("first", "second"):
        model.base_model.set_adapter(name)
        parts.append(layer(x) - base)
    torch.testing.assert_close(both - base, parts[0] + parts[1], atol=1e-4, rtol=1e-4)
    trained = {"first", "second"}
    model.base_model.set_adapter(["first", "second"])
    assert {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad} == trained


def test_deleting() -> None:
    model = two_adapters()
    expected = alone(model, "second")
    with pytest.warns(UserWarning, match="Setting active adapter to second"):
        model.delete_adapter("first")
    assert torch.equal(outputs(model), expected)
    assert set(model.peft_config) == {"second"}
    assert not any(".first." in key for key in model.state_dict())
    assert not any("first" in layer.configs or "first" in layer.scaling for layer in tuner_layers(model).values())
    model.delete_adapter("second")
    assert torch.equal(outputs(model.base_model.model), outputs(tiny_model()))  # a PeftModel without any does not run
    assert not adapter_tensors(model)
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")


@pytest.mark.parametrize("preset", ["mixlora", "sira capacity", "smora", "molora"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_adapter_for_each_sample(preset: str, side: str) -> None:
    preset, _, capacity = preset.partition(" ")
    words: dict[str, Any] = {"capacity_in_eval": True, "capacity_factor": 0.7} if capacity else {}
    model = adapted(preset, adapter_name="first", **words)
    second: dict[str, Any] = {"r": 7} if preset == "smora" else {"num_experts": 5}
    model.add_adapter("second", small_config(preset, **{**second, **words}))
    shake(model, seed=4)
    model.eval()
    batch: dict[str, Any] = tiny_batch(batch_size=5, length=12)
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    names = ["second", "__base__", "first", "second", "__base__"]
    together = outputs(model, **batch, adapter_names=names)
    for row, name in enumerate(names):
        one: dict[str, Any] = {key: value[row : row + 1] for key, value in batch.items()}
        if name == "__base__":
            with model.disable_adapter():
                expected = outputs(model, **one)
        else:
            model.set_adapter(name)
            expected = outputs(model, **one)
        torch.testing.assert_close(together[row], expected[0], atol=5e-6, rtol=1e-5)
    assert not any(module._forward_pre_hooks for module in tuner_layers(model).values())


@pytest.mark.parametrize("beams", [1, 3])
def test_an_adapter_for_each_sample_in_generation(beams: int) -> None:
    model = two_adapters()
    ids = tiny_batch(batch_size=3, length=6)["input_ids"].clamp_min(3)
    words = {"max_new_tokens": 5, "do_sample": False, "num_beams": beams, "eos_token_id": None}
    names = ["first", "__base__", "second"]
    together = model.generate(input_ids=ids, adapter_names=names, **words)
    for row, name in enumerate(names):
        one = model.generate(input_ids=ids[row : row + 1], adapter_names=[name], **words)
        assert torch.equal(together[row], one[0])


def test_an_adapter_for_each_sample_with_heads_saved_whole() -> None:
    model = adapted("sira", "bert", adapter_name="first")
    model.add_adapter("second", small_config("sira", "bert"))
    shake(model)
    for adapter, value in (("first", 1.0), ("second", 2.0)):
        model.base_model.model.classifier.modules_to_save[adapter].bias.data.fill_(value)
    model.eval()
    names = ["second", "first", "second"]
    together = outputs(model, "bert", adapter_names=names)
    for row, name in enumerate(names):
        model.set_adapter(name)
        torch.testing.assert_close(together[row], outputs(model, "bert")[row], atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["first", "third", "first"], r"unknown adapter\(s\) \['third'\]; allowed: __base__, first, second"),
        (["first", "second"], "2 names for a batch of 3; allowed: one for each sample"),
    ],
)
def test_names_that_do_not_fit_the_batch_are_refused(names: list[str], message: str) -> None:
    model = two_adapters()
    with pytest.raises(AdapterNameError, match=message):
        outputs(model, adapter_names=names)
    outputs(model)
    with pytest.raises(AdapterNameError, match="eval mode only"):
        model.train()(**tiny_batch(), adapter_names=["first"] * 3)


def test_set_scale() -> None:
    model = adapted("mixlora")
    base, full = outputs(tiny_model()), outputs(model)
    for layer in tuner_layers(model).values():
        layer.set_scale("default", 0.0)
    torch.testing.assert_close(outputs(model), base, atol=2e-6, rtol=1e-5)
    for layer in tuner_layers(model).values():
        layer.set_scale("default", 1.0)
        layer.set_scale("unknown", 3.0)
    assert torch.equal(outputs(model), full)
