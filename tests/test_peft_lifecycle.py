"""The rest of an adapter's life in PEFT: unloading, refusing to merge, status, copies, dtypes, registration."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, mapping
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

import moelora
from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError, MergeError, MoeLoraError, RegistrationError
from moelora.loading import loading, swappable_weights
from moelora.routing.run import find_hooks, own_hooks
from tests.adapters import (
    KEEPS_BASE,
    PRESETS,
    ROUTED,
    adapted,
    adapter_tensors,
    assert_equal_tensors,
    outputs,
    shake,
    small_config,
    snapshot,
    train_steps,
    tuner_layers,
    two_adapters,
)
from tests.conftest import tiny_batch, tiny_model


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_unloading_gives_the_model_back(preset: str, name: str) -> None:
    base = tiny_model(name)
    before = snapshot(base)
    expected = outputs(base, name)
    model = get_peft_model(base, small_config(preset, name))
    shake(model)
    with record_routing(model):
        outputs(model, name)
    unloaded = model.unload()
    assert unloaded is base
    after = snapshot(base)
    # adapters freeze the base, as every PEFT method does
    for view in (before, after):
        view["parameters"] = {key: (value[0], value[2]) for key, value in view["parameters"].items()}
    assert after == before
    assert torch.equal(outputs(base, name), expected)
    assert find_hooks(base) is None
    assert "moelora" not in (getattr(base, "model_tags", None) or [])
    get_peft_model(base, small_config(preset, name))


MERGES: dict[str, Callable[[Any], Any]] = {
    "merge_and_unload": lambda model: model.merge_and_unload(),
    "merge_and_unload safely": lambda model: model.merge_and_unload(safe_merge=True, adapter_names=["default"]),
    "merge_adapter": lambda model: model.merge_adapter(),
    "merge_adapter by name": lambda model: model.merge_adapter(["default"], safe_merge=True),
    "unmerge_adapter": lambda model: model.unmerge_adapter(),
    "add_weighted_adapter": lambda model: model.add_weighted_adapter(["default"], [1.0], "merged"),
    "base_model.merge_and_unload": lambda model: model.base_model.merge_and_unload(),
    "layer.merge": lambda model: next(iter(tuner_layers(model).values())).merge(),
    "layer.unmerge": lambda model: next(iter(tuner_layers(model).values())).unmerge(),
}


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
@pytest.mark.parametrize("way", MERGES)
def test_merging_is_refused_with_the_model_untouched(preset: str, way: str) -> None:
    model = adapted(preset)
    before, logits, tensors = snapshot(model), outputs(model), adapter_tensors(model)
    with pytest.raises(MergeError, match=r"unload|set_adapter") as error:
        MERGES[way](model)
    assert isinstance(error.value, (ValueError, NotImplementedError))
    assert snapshot(model) == before
    assert torch.equal(outputs(model), logits)
    assert_equal_tensors(adapter_tensors(model), tensors)
    assert set(model.peft_config) == {"default"}


def test_status() -> None:
    model = two_adapters()
    status = model.get_model_status()
    assert status.base_model_type == "LlamaForCausalLM"
    assert status.adapter_model_type == "MoeLoraModel"
    assert status.peft_types == {"first": "MOELORA", "second": "MOELORA"}
    assert status.enabled is True
    assert status.active_adapters == ["first"]
    assert status.merged_adapters == []
    assert status.available_adapters == ["first", "second"]
    assert status.requires_grad == {"first": True, "second": False}
    assert status.trainable_params == small_config("mixlora").num_trainable_parameters(tiny_model())
    layers = {layer.name: layer for layer in model.get_layer_status()}
    assert len(layers) == status.num_adapter_layers == len(tuner_layers(model))
    assert layers["model.model.layers.0.mlp"].module_type == "moelora.MixtureFeedForward"
    assert layers["model.model.layers.0.mlp"].available_adapters == ["first", "second"]


@pytest.mark.parametrize("preset", ROUTED)
def test_deep_copies_are_independent(preset: str) -> None:
    model = adapted(preset)
    with record_routing(model) as listener:
        outputs(model)
        other = copy.deepcopy(model)
        records = len(listener.records)
        outputs(other)
        assert len(listener.records) == records
    own = own_hooks(other.get_base_model())
    assert own is not None
    assert own is not own_hooks(model.get_base_model())
    assert {id(layer) for layer in own.layers} == {id(layer) for layer in tuner_layers(other).values()}
    with record_routing(other) as listener:
        outputs(other)
        assert len(listener.records) == records
    assert torch.equal(outputs(other), outputs(model))
    expected = outputs(model)
    shake(other, seed=5)
    assert torch.equal(outputs(model), expected)
    base = other.unload()
    assert torch.equal(outputs(base), outputs(tiny_model()))
    assert not base._forward_hooks
    assert not base._forward_pre_hooks
    with record_routing(model) as listener:
        outputs(model)
        assert len(listener.records) == records


@pytest.mark.parametrize("preset", PRESETS)
def test_a_whole_model_survives_torch_save(preset: str) -> None:
    model = adapted(preset)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert torch.equal(outputs(loaded), outputs(model))
    if preset == "lora":
        return
    with record_routing(loaded) as listener:
        outputs(loaded)
        assert listener.records


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_on_a_bf16_base(preset: str, autocast: bool) -> None:
    base = tiny_model().to(torch.bfloat16)
    expected = outputs(base)
    model = get_peft_model(base, small_config(preset, **KEEPS_BASE.get(preset, {})), autocast_adapter_dtype=autocast)
    for key, tensor in adapter_tensors(model).items():
        assert tensor.dtype == (torch.float32 if autocast or key.endswith(".bias") else torch.bfloat16), key
    assert outputs(model).dtype == torch.bfloat16
    torch.testing.assert_close(outputs(model), expected, atol=5e-3, rtol=5e-2)
    shake(model)
    seen: list[torch.dtype] = []
    if preset != "lora":
        with record_routing(model) as listener:
            outputs(model)
            seen = [r.routing.logits_TE.dtype for r in listener.records]
            seen += [r.routing.weights_TK.dtype for r in listener.records]
            assert seen
    assert set(seen) <= {torch.float32}
    train_steps(model, steps=1)


def test_autocast_leaves_the_router_in_fp32() -> None:
    model = adapted("mixlora")
    with record_routing(model) as listener, torch.autocast("cpu", dtype=torch.bfloat16):
        assert outputs(model).dtype == torch.bfloat16
        routing = listener.records[0].routing
    assert routing.logits_TE.dtype == routing.weights_TK.dtype == torch.float32
    x, router = torch.randn(4, 36), tuner_layers(model)["model.layers.0.mlp"].moelora_router["default"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits = router(x, torch.ones(1, 4, dtype=torch.bool)).logits_TE
    assert torch.equal(logits, x @ router.weight.T)


def test_the_bias_of_smora_moves_only_in_training_and_once_a_forward() -> None:
    model = adapted("smora", bias_update_rate=0.25)
    routers = [layer.moelora_router["default"] for layer in tuner_layers(model).values()]

    def reset() -> None:
        for router in routers:
            router.bias.zero_()

    def moves() -> set[float]:
        return {abs(value) for router in routers for value in router.bias.tolist()}

    reset()
    outputs(model)
    model(**tiny_batch()).loss.backward()
    assert moves() == {0.0}
    model.train()
    with torch.no_grad():
        model(**tiny_batch())
    assert moves() == {0.0}  # e.g. a reference model's forward inside a training step
    model(**tiny_batch()).loss.backward()
    assert moves() <= {0.0, 0.25}
    assert 0.25 in moves()
    for reentrant in (True, False):
        reset()
        model.activation_checkpointing_enable({"use_reentrant": reentrant})
        model.enable_input_require_grads()
        model(**tiny_batch()).loss.backward()
        assert 0.25 in moves()
        assert moves() <= {0.0, 0.25}
    assert not any(router.bias.requires_grad for router in routers)


def test_the_bias_of_smora_stays_in_fp32() -> None:
    model = adapted("smora", bias_update_rate=1e-5)
    for cast in (lambda m: m.to(torch.bfloat16), lambda m: m.half(), lambda m: m.bfloat16()):
        cast(model)
        for layer in tuner_layers(model).values():
            assert layer.moelora_router["default"].bias.dtype == torch.float32
    model.to(torch.bfloat16).train()
    before = {key: value for key, value in adapter_tensors(model).items() if key.endswith(".bias")}
    model(**tiny_batch()).loss.backward()
    after = adapter_tensors(model)
    for key, bias in before.items():
        step = (after[key] - bias).abs()
        assert ((step < 1e-9) | ((step - 1e-5).abs() < 1e-7)).all()
        assert step.max() > 0


def test_a_random_router_is_never_trained_and_saved_exactly(tmp_path: Path) -> None:
    model = adapted("random_router")
    before = {key: value for key, value in adapter_tensors(model).items() if "router" in key}
    assert before
    assert not any("router" in name and p.requires_grad for name, p in model.named_parameters())
    train_steps(model)
    model.set_adapter("default")
    train_steps(model)
    model.save_pretrained(str(tmp_path))
    for words in ({}, {"low_cpu_mem_usage": True}, {"is_trainable": True}):
        loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path), **words)
        after = {key: value for key, value in adapter_tensors(loaded).items() if "router" in key}
        assert_equal_tensors(after, before)
    again = get_peft_model(tiny_model(), small_config("random_router"))
    fresh = {key: value for key, value in adapter_tensors(again).items() if "router" in key}
    assert not any(torch.equal(fresh[key], value) for key, value in before.items())


def test_registering_twice_is_harmless() -> None:
    from moelora.peft_plugin import register

    register(moelora.MoeLoraConfig, moelora.MoeLoraModel, loading, swappable_weights)


@pytest.mark.parametrize("table", ["config", "prefix"])
def test_a_name_taken_by_another_package_is_refused(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelora.peft_plugin import register

    if table == "config":
        owner = r"peft\.tuners\.lora\.config"
        monkeypatch.setitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "MOELORA", LoraConfig)
    else:
        owner = "OTHER"
        monkeypatch.delitem(mapping.PEFT_TYPE_TO_CONFIG_MAPPING, "MOELORA")
        monkeypatch.delitem(mapping.PEFT_TYPE_TO_PREFIX_MAPPING, "MOELORA")
        monkeypatch.setitem(mapping.PEFT_TYPE_TO_PREFIX_MAPPING, "OTHER", "moelora_")
    before = dict(mapping.PEFT_TYPE_TO_CONFIG_MAPPING), dict(mapping.PEFT_TYPE_TO_PREFIX_MAPPING)
    message = f"PEFT type 'MOELORA' with prefix 'moelora_' is already taken by '{owner}'.*import only one of them"
    with pytest.raises(RegistrationError, match=message):
        register(moelora.MoeLoraConfig, moelora.MoeLoraModel, loading, swappable_weights)
    assert before[0] == mapping.PEFT_TYPE_TO_CONFIG_MAPPING
    assert before[1] == mapping.PEFT_TYPE_TO_PREFIX_MAPPING


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_adapter_api(preset: str, tmp_path: Path) -> None:
    model = tiny_model()
    base = outputs(model)
    model.add_adapter(small_config(preset), "first")
    shake(model)
    first = outputs(model.eval())
    assert torch.equal(first, outputs(adapted(preset)))
    second_words: dict[str, Any] = {"r": 4} if preset in ("lora", "smora") else {"num_experts": 3}
    model.add_adapter(small_config(preset, **{**second_words, **KEEPS_BASE.get(preset, {})}), "second")
    assert model.active_adapters() == ["second"]
    torch.testing.assert_close(outputs(model), base, atol=2e-6, rtol=1e-5)
    model.set_adapter("first")
    assert torch.equal(outputs(model), first)
    model.disable_adapters()
    assert torch.equal(outputs(model), base)
    model.enable_adapters()
    assert torch.equal(outputs(model), first)

    model.save_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_model(), str(tmp_path))), first)
    loaded = tiny_model()
    loaded.load_adapter(str(tmp_path), adapter_name="again")
    assert torch.equal(outputs(loaded), first)
    assert not any(p.requires_grad for name, p in loaded.named_parameters() if "moelora_" in name)

    model.delete_adapter("first")
    model.delete_adapter("second")
    assert torch.equal(outputs(model), base)
    assert not adapter_tensors(model)
    model.add_adapter(small_config(preset), "third")


@pytest.mark.parametrize("path", ["model.layers.0.mlp", "model.layers.0.self_attn.q_proj"])
def test_a_layer_called_with_more_than_its_input_says_so(path: str) -> None:
    model, x = adapted("mixlora"), torch.randn(1, 2, 36)
    layer = tuner_layers(model)[path]
    with pytest.raises(MoeLoraError, match=rf"'{path}' was called with more than its input \(1 further .*\['scale'\]"):
        layer(x, x, scale=2)
    with model.disable_adapter(), pytest.raises(TypeError):  # the module's own business
        layer(x, x, scale=2)


@pytest.mark.parametrize("make", [MoeLoraConfig, partial(MoeLoraConfig.from_preset, "mixlora")])
def test_what_peft_has_for_lora_alone_is_refused_by_name(make: Any) -> None:
    """It ties adapters of embeddings, which no mixture is on."""
    with pytest.raises((ConfigError, TypeError), match="'ensure_weight_tying'"):
        make(ensure_weight_tying=True)


def test_peft_layers_are_what_peft_expects() -> None:
    for layer in tuner_layers(adapted("mixlora")).values():
        assert isinstance(layer, BaseTunerLayer)
        for attribute in layer.adapter_layer_names:
            assert isinstance(getattr(layer, attribute), nn.ModuleDict)
            assert attribute.startswith("moelora_")
        assert all(
            isinstance(getattr(layer, attribute), (dict, nn.ModuleDict)) for attribute in layer.other_param_names
        )
        assert repr(layer).startswith("moelora.")
