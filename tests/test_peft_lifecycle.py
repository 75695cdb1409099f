"""An adapter's life in PEFT: save and load, several adapters, switching, unloading, copying, refusing to merge."""

from __future__ import annotations

import copy
import io
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import (
    AutoPeftModel,
    AutoPeftModelForCausalLM,
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    mapping,
    set_peft_model_state_dict,
)
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file
from torch import Tensor, nn

import moelora
from moelora import record_routing
from moelora.errors import AdapterNameError, MergeError, RegistrationError
from moelora.routing.recorder import find_recorder, own_recorder
from tests.adapters import (
    PRESETS,
    adapted,
    adapter_tensors,
    outputs,
    shake,
    small_config,
    snapshot,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model

ROUTED = tuple(preset for preset in PRESETS if preset != "lora")


def train_steps(model: Any, name: str = "llama", steps: int = 2) -> None:
    """A few optimizer steps, which also move smora's biases."""
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for step in range(steps):
        optimizer.zero_grad()
        model(**tiny_batch(name, seed=step)).loss.backward()
        optimizer.step()
    model.eval()


def assert_equal_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        assert actual[key].dtype == tensor.dtype, key
        assert torch.equal(actual[key], tensor), key


# ---- saving and loading


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_save_and_load_bit_for_bit(preset: str, name: str, low_memory: bool, tmp_path: Path) -> None:
    model = adapted(preset, name, **({"bias_update_rate": 1e-2} if preset == "smora" else {}))
    train_steps(model, name)
    if preset == "smora":
        biases = [tensor for key, tensor in adapter_tensors(model).items() if key.endswith(".bias")]
        assert biases
        assert all(bias.any() for bias in biases)
    model.save_pretrained(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated")  # peft's own
        loaded = PeftModel.from_pretrained(tiny_model(name), str(tmp_path), low_cpu_mem_usage=low_memory)
    assert_equal_tensors(adapter_tensors(loaded), adapter_tensors(model))
    assert torch.equal(outputs(loaded, name), outputs(model, name))
    assert not any(p.requires_grad for p in loaded.parameters())
    assert not any(p.is_meta for p in loaded.parameters())
    assert loaded.peft_config["default"].inference_mode
    config = copy.deepcopy(model.peft_config["default"])
    config.inference_mode = True
    assert loaded.peft_config["default"] == config


@pytest.mark.parametrize("preset", PRESETS)
def test_keys_of_the_file(preset: str, tmp_path: Path) -> None:
    model = adapted(preset)
    model.save_pretrained(str(tmp_path))
    keys = set(load_file(str(tmp_path / "adapter_model.safetensors")))
    expected = set()
    for path, layer in tuner_layers(model).items():
        roles = [f"{role}_" if role else "" for role in layer.linears()]
        expected |= {f"{path}.moelora_{role}{factor}.weight" for role in roles for factor in "AB"}
        if layer.moelora_router:
            expected.add(f"{path}.moelora_router.weight")
            if preset == "smora":
                expected.add(f"{path}.moelora_router.bias")
    assert keys == {f"base_model.model.{key}" for key in expected}
    assert {path.name for path in tmp_path.iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
        "README.md",
    }
    tags = (tmp_path / "README.md").read_text()
    assert "- moelora" in tags
    assert "library_name: peft" in tags


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., str]:
    """Save a base model once and adapters on it."""
    base_path = tmp_path / "base"
    tiny_model().save_pretrained(base_path)

    def save(preset: str, folder: str = "adapter", seed: int = 0, **words: Any) -> str:
        model = adapted(preset, seed=seed, base_model_name_or_path=str(base_path), **words)
        model.save_pretrained(str(tmp_path / folder))
        config = tmp_path / folder / "adapter_config.json"
        content = json.loads(config.read_text())
        content["base_model_name_or_path"] = str(base_path)  # PEFT puts the name of the model that it was given
        config.write_text(json.dumps(content))
        return str(tmp_path / folder)

    return save


@pytest.mark.parametrize("preset", PRESETS)
def test_auto_classes(preset: str, saved: Callable[..., str]) -> None:
    expected = outputs(adapted(preset))
    loaded = AutoPeftModelForCausalLM.from_pretrained(saved(preset))
    assert isinstance(loaded, PeftModel)
    assert torch.equal(outputs(loaded), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_loads_an_adapter_folder(preset: str, saved: Callable[..., str]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(saved(preset))
    assert torch.equal(outputs(model), outputs(adapted(preset)))
    assert_equal_tensors(
        adapter_tensors(model),
        {key.removeprefix("base_model.model."): value for key, value in adapter_tensors(adapted(preset)).items()},
    )


def test_is_trainable_continues_training(tmp_path: Path) -> None:
    model = adapted("mixlora")
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path), is_trainable=True)
    assert {name for name, p in loaded.named_parameters() if p.requires_grad} == trainable
    assert not loaded.peft_config["default"].inference_mode
    train_steps(loaded)
    assert not torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize("bias", ["all", "moelora_only"])
@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_trained_biases_are_saved(bias: str, preset: str, tmp_path: Path) -> None:
    model = adapted(preset, "phi", bias=bias)
    biases = [name for name, p in model.named_parameters() if p.requires_grad and name.endswith(".bias")]
    assert any("fc1" in name for name in biases)
    before = {name: model.get_parameter(name).clone() for name in biases}
    train_steps(model, "phi")
    # the keys' bias cancels in the softmax
    assert all(not torch.equal(model.get_parameter(name), old) for name, old in before.items() if "k_proj" not in name)
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("phi"), str(tmp_path))
    assert torch.equal(outputs(loaded, "phi"), outputs(model, "phi"))


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_modules_to_save_and_trained_tokens(preset: str, tmp_path: Path) -> None:
    model = adapted(preset, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    train_steps(model)
    model.save_pretrained(str(tmp_path))
    keys = load_file(str(tmp_path / "adapter_model.safetensors"))
    assert "base_model.model.lm_head.weight" in keys
    assert any("trainable_tokens_delta" in key for key in keys)
    loaded = PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert torch.equal(outputs(loaded), outputs(model))
    with model.disable_adapter():
        assert torch.equal(outputs(model), outputs(tiny_model()))


def test_auto_class_without_a_task(saved: Callable[..., str]) -> None:
    from transformers import AutoConfig

    path = saved("mixlora", task_type=None)
    config = json.loads((Path(path) / "adapter_config.json").read_text())
    config["auto_mapping"] = {"base_model_class": "LlamaForCausalLM", "parent_library": "transformers"}
    assert AutoConfig.from_pretrained(config["base_model_name_or_path"]).model_type == "llama"
    (Path(path) / "adapter_config.json").write_text(json.dumps(config))
    assert torch.equal(outputs(AutoPeftModel.from_pretrained(path)), outputs(adapted("mixlora")))


def test_classification_head_is_trained_and_saved(tmp_path: Path) -> None:
    model = adapted("sira", "bert")
    assert any(p.requires_grad for name, p in model.named_parameters() if "classifier.modules_to_save" in name)
    train_steps(model, "bert")
    model.save_pretrained(str(tmp_path))
    loaded = PeftModel.from_pretrained(tiny_model("bert"), str(tmp_path))
    assert torch.equal(outputs(loaded, "bert"), outputs(model, "bert"))


@pytest.mark.parametrize("preset", PRESETS)
def test_state_dict_functions(preset: str) -> None:
    model, other = adapted(preset), adapted(preset, seed=1)
    state_dict = get_peft_model_state_dict(model)
    assert not any(".default" in key for key in state_dict)
    result = set_peft_model_state_dict(other, state_dict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "moelora_" in key]
    assert_equal_tensors(adapter_tensors(other), adapter_tensors(model))


@pytest.mark.parametrize("preset", PRESETS)
def test_injection_without_a_peft_model(preset: str) -> None:
    expected = adapted(preset)
    state_dict = {key.removeprefix("base_model.model."): v for key, v in get_peft_model_state_dict(expected).items()}
    for given in (None, state_dict):
        model = inject_adapter_in_model(small_config(preset), tiny_model(), state_dict=given)
        set_peft_model_state_dict(model, state_dict)
        assert torch.equal(outputs(model.eval()), outputs(expected))
    assert record_routing(model) is not None


def test_injection_by_a_state_dict_of_fewer_modules() -> None:
    full = get_peft_model_state_dict(adapted("sira"))
    some = {key.removeprefix("base_model.model."): v for key, v in full.items() if ".layers.1." in key}
    with pytest.warns(RuntimeWarning, match="an inconsistency was discovered"):
        model = inject_adapter_in_model(small_config("sira"), tiny_model(), state_dict=some)
    assert {name.split(".")[2] for name in tuner_layers(model)} == {"1"}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
def test_hotswap(preset: str, low_memory: bool, saved: Callable[..., str]) -> None:
    first, second = saved(preset, "first", seed=1), saved(preset, "second", seed=2)
    expected = outputs(adapted(preset, seed=2))
    model = PeftModel.from_pretrained(tiny_model(), first, low_cpu_mem_usage=low_memory)
    assert not torch.equal(outputs(model), expected)
    hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model), expected)
    assert_equal_tensors(adapter_tensors(model), adapter_tensors(adapted(preset, seed=2)))


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ({"r": 2}, "experts"),
        ({"lora_alpha": 5}, "experts"),
        ({"num_experts": 3}, "experts"),
        ({"top_k": 1}, "routing"),
        ({"renormalize": True}, "routing"),
    ],
)
def test_hotswap_of_another_shape_or_meaning_is_refused(
    words: dict[str, Any], key: str, saved: Callable[..., str]
) -> None:
    first, second = saved("sira", "first"), saved("sira", "second", **words)
    model = PeftModel.from_pretrained(tiny_model(), first)
    before = outputs(model)
    with pytest.raises(ValueError, match=f"incompatible: for {key}"):
        hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model), before)


# ---- several adapters


def two_adapters() -> Any:
    """A model with a small and a larger MixLoRA adapter on different targets; "first" is active."""
    model = adapted("mixlora", adapter_name="first")
    model.add_adapter(
        "second", small_config("mixlora", num_experts=6, r=2, top_k=3, target_modules=["up_proj", "q_proj"])
    )
    shake(model, seed=7)
    return model.eval()


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
    assert not any("first" in layer.experts or "first" in layer.scaling for layer in tuner_layers(model).values())
    model.delete_adapter("second")
    assert torch.equal(outputs(model.base_model.model), outputs(tiny_model()))  # a PeftModel without any does not run
    assert not adapter_tensors(model)
    with pytest.raises(ValueError, match="second"):
        model.delete_adapter("second")


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_disabling_gives_the_base_model_bit_for_bit(preset: str, name: str) -> None:
    model, base = adapted(preset, name), outputs(tiny_model(name), name)
    before = outputs(model, name)
    assert not torch.equal(before, base)
    with model.disable_adapter():
        assert torch.equal(outputs(model, name), base)
    assert torch.equal(outputs(model, name), before)
    model.base_model.disable_adapter_layers()
    assert torch.equal(outputs(model, name), base)
    assert not any(p.requires_grad for p in model.parameters())
    model.base_model.enable_adapter_layers()
    assert torch.equal(outputs(model, name), before)


@pytest.mark.parametrize("preset", ["mixlora", "sira capacity", "smora", "molora"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_an_adapter_for_each_sample(preset: str, side: str) -> None:
    preset, _, capacity = preset.partition(" ")
    words = {"capacity_in_eval": True, "capacity_factor": 0.7} if capacity else {}
    model = adapted(preset, adapter_name="first", **words)
    second = {"r": 7} if preset == "smora" else {"num_experts": 5}
    model.add_adapter("second", small_config(preset, **{**second, **words}))
    shake(model, seed=4)
    model.eval()
    batch = tiny_batch(batch_size=5, length=12)
    if side == "left":
        batch = {key: value.flip(1) for key, value in batch.items()}
    names = ["second", "__base__", "first", "second", "__base__"]
    together = outputs(model, **batch, adapter_names=names)
    for row, name in enumerate(names):
        one = {key: value[row : row + 1] for key, value in batch.items()}
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


# ---- leaving


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
    assert find_recorder(base) is None
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


@pytest.mark.parametrize("preset", PRESETS)
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


# ---- status, copies


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
    assert own_recorder(other.get_base_model()) is not own_recorder(model.get_base_model())
    assert all(layer.recorder is find_recorder(other) for layer in tuner_layers(other).values())
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


# ---- dtypes


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("preset", PRESETS)
def test_adapters_on_a_bf16_base(preset: str, autocast: bool) -> None:
    base = tiny_model().to(torch.bfloat16)
    expected = outputs(base)
    model = get_peft_model(base, small_config(preset), autocast_adapter_dtype=autocast)
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


# ---- what belongs to one preset


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
    assert not any("router" in name for name, _ in model.named_parameters())
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


# ---- registration


def test_registering_twice_is_harmless() -> None:
    from moelora.peft_plugin import register

    register(moelora.MoeLoraConfig, moelora.MoeLoraModel)


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
        register(moelora.MoeLoraConfig, moelora.MoeLoraModel)
    assert (mapping.PEFT_TYPE_TO_CONFIG_MAPPING, mapping.PEFT_TYPE_TO_PREFIX_MAPPING) == before


# ---- transformers' own adapter API


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("preset", PRESETS)
def test_transformers_adapter_api(preset: str, tmp_path: Path) -> None:
    model = tiny_model()
    base = outputs(model)
    model.add_adapter(small_config(preset), "first")
    shake(model)
    first = outputs(model.eval())
    assert torch.equal(first, outputs(adapted(preset)))
    second_words = {"r": 4} if preset in ("lora", "smora") else {"num_experts": 3}
    model.add_adapter(small_config(preset, **second_words), "second")
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
