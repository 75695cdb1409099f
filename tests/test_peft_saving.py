"""Saving and loading an adapter, in all the ways that PEFT and transformers know."""

from __future__ import annotations

import copy
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
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    inject_adapter_in_model,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from safetensors.torch import load_file
from torch import nn

from moelora import record_routing
from moelora.errors import TargetError
from tests.adapters import (
    PRESETS,
    adapted,
    adapter_tensors,
    assert_equal_tensors,
    outputs,
    shake,
    small_config,
    snapshot,
    train_steps,
    tuner_layers,
)
from tests.conftest import tiny_model


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["llama", "phi3"])
def test_save_and_load_bit_for_bit(preset: str, name: str, low_memory: bool, tmp_path: Path) -> None:
    words: dict[str, Any] = {"bias_update_rate": 1e-2} if preset == "smora" else {}
    model = adapted(preset, name, **words)
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
    # the tensors are equal bit for bit; where a file's views lie in memory decides how a product rounds
    torch.testing.assert_close(outputs(loaded, name), outputs(model, name), rtol=1e-5, atol=1e-6)
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
        roles = [role or "weight" for role in layer.linear_sizes()]
        expected |= {f"{path}.moelora_{factor}.{role}" for role in roles for factor in "AB"}
        if layer.moelora_router:
            expected.add(f"{path}.moelora_router.weight")
            if preset == "smora":
                expected.add(f"{path}.moelora_router.bias")
            if preset == "adamole":
                expected |= {f"{path}.moelora_router.threshold_{name}" for name in ("weight", "bias")}
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
        model = adapted(preset, seed=seed, **words)
        model.save_pretrained(str(tmp_path / folder))
        config = tmp_path / folder / "adapter_config.json"
        content = json.loads(config.read_text())
        content["base_model_name_or_path"] = str(base_path)  # PEFT notes the name of the model it was given: none
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


@pytest.mark.parametrize("preset", PRESETS)
def test_hotswap_with_little_memory(preset: str, saved: Callable[..., str]) -> None:
    first, second = saved(preset, "first", seed=1), saved(preset, "second", seed=2)
    expected = outputs(adapted(preset, seed=2))
    model = PeftModel.from_pretrained(tiny_model(), first, low_cpu_mem_usage=True)
    assert not torch.equal(outputs(model), expected)
    hotswap_adapter(model, second, adapter_name="default", torch_device="cpu")
    # tensors that are views of a file need not be aligned, and a matrix product then sums in another order
    torch.testing.assert_close(outputs(model), expected, rtol=0, atol=1e-6)
    assert_equal_tensors(adapter_tensors(model), adapter_tensors(adapted(preset, seed=2)))


def test_hotswap_into_a_compiled_model_compiles_nothing_again(tmp_path: Path) -> None:
    """What may be swapped has the same shapes; PEFT's preparation pads LoRAs of another rank, and finds none here."""

    def made(seed: int) -> Any:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))
        model = get_peft_model(net, small_config("sira", task_type=None)).eval()
        shake(model, seed)
        return model

    graphs: list[Any] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    model, other, x = made(1), made(2), torch.randn(2, 3, 6)
    other.save_pretrained(str(tmp_path))
    with pytest.raises(ValueError, match="No adapter layers found on the model") as refused:
        prepare_model_for_compiled_hotswap(model, target_rank=8)
    # PEFT calls nothing of a method's before it says so: the page is found by its words
    heading = "### " + str(refused.value).partition(",")[0] + " {#hotswap}"
    assert heading in (Path(__file__).parents[1] / "docs/troubleshooting.md").read_text().splitlines()
    compiled = torch.compile(model, backend=backend)
    with torch.no_grad():
        before, count = compiled(x), len(graphs)
        hotswap_adapter(compiled, str(tmp_path), adapter_name="default", torch_device="cpu")
        after, expected = compiled(x), other(x)
    assert count
    assert len(graphs) == count
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        ({"r": 2}, "experts"),
        ({"lora_alpha": 5}, "experts"),
        ({"num_experts": 3}, "experts"),
        ({"top_k": 1}, "selection"),
        ({"renormalize": True}, "selection"),
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


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "wider": ({"hidden_size": 48}, r"tensors have another shape \(.*moelora_\w+\.default\.\w+ is \[.*36.*48"),
    "deeper": ({"num_hidden_layers": 3}, r"places get no tensor \(.*layers\.2\."),
    "shallower": ({"num_hidden_layers": 1}, r"tensors have no place \(.*layers\.1\."),
}


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("misfit", MISFITS)
@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_an_adapter_of_another_base_is_refused(preset: str, misfit: str, low_memory: bool, tmp_path: Path) -> None:
    # of what does not fit PEFT ignores one part, warns about another, and starts the rest at random
    adapted(preset).save_pretrained(str(tmp_path))
    overrides, message = MISFITS[misfit]
    base = tiny_model(**overrides)
    before = snapshot(base)
    with pytest.raises(TargetError, match=rf"do not fit.*{message}.*Allowed: the base model it was trained on"):
        PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=low_memory)
    after = snapshot(base)
    for view in (before, after):
        view["parameters"] = {key: (value[0], value[2]) for key, value in view["parameters"].items()}
    assert after == before


def test_loading_what_does_not_fit_keeps_the_other_adapter(tmp_path: Path) -> None:
    adapted("mixlora").save_pretrained(str(tmp_path))
    model = adapted("mixlora", adapter_name="first")
    state_dict = get_peft_model_state_dict(adapted("mixlora", r=2))
    before, tensors = outputs(model), adapter_tensors(model)
    with pytest.raises(TargetError, match="tensors have another shape"):
        set_peft_model_state_dict(model, state_dict, adapter_name="first")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["layers_to_transform"] = [0]  # fewer places than the file has tensors
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(TargetError, match="tensors have no place"):
        model.load_adapter(str(tmp_path), adapter_name="second")
    assert torch.equal(outputs(model), before)
    assert_equal_tensors(adapter_tensors(model), tensors)
    assert set(model.peft_config) == {"first"}
    assert model.active_adapters == ["first"]
