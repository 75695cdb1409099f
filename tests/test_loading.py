"""An adapter is loaded wholly or not at all: what its files may hold, and that a failed load leaves no trace."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.errors import AdapterFileError, AdapterNameError, ConfigError, MoeLoraError, TargetError
from tests.adapters import adapted, adapter_tensors, assert_equal_tensors, outputs, small_config, snapshot
from tests.conftest import tiny_model

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
Change = Callable[[Path], object]


def tensors(change: Callable[[dict[str, Tensor]], object]) -> Change:
    def apply(folder: Path) -> None:
        found = load_file(folder / WEIGHTS)
        change(found)
        save_file(found, folder / WEIGHTS, metadata={"format": "pt"})

    return apply


def words(**changes: Any) -> Change:
    def apply(folder: Path) -> None:
        found = json.loads((folder / CONFIG).read_text())
        for name, value in changes.items():
            axis, _, field = name.partition("__")
            (found[axis] if field else found)[field or axis] = value
        (folder / CONFIG).write_text(json.dumps(found))

    return apply


def stranger(name: str) -> Change:
    of_base = tiny_model().state_dict().get(name.replace(".base_layer", ""), torch.zeros(2))
    return tensors(lambda found: found.update({f"base_model.model.{name}": torch.randn(of_base.shape)}))


def first(change: Callable[[Tensor], Tensor]) -> Change:
    def apply(found: dict[str, Tensor]) -> None:
        key = next(key for key in found if "moelora_B" in key)
        found[key] = change(found[key])

    return tensors(apply)


def filled(value: float) -> Change:
    return first(lambda tensor: tensor.flatten().index_fill(0, torch.tensor([3]), value).view(tensor.shape))


def cut(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:3000])


def without(module: str) -> Change:
    """A file that has no tensor of a module at all."""

    def apply(found: dict[str, Tensor]) -> None:
        gone = [key for key in found if key.startswith(f"base_model.model.{module}.")]
        assert gone
        for key in gone:
            del found[key]

    return tensors(apply)


Q = "model.layers.0.self_attn.q_proj"
FAULTS: dict[str, tuple[Change, str]] = {
    "an output head": (stranger("lm_head.weight"), r"no place \(base_model.model.lm_head.weight"),
    "embeddings": (stranger("model.embed_tokens.weight"), r"no place \(\S*embed_tokens.weight"),
    "a norm": (stranger("model.norm.weight"), r"no place \(\S*model.norm.weight"),
    "a linear": (stranger(f"{Q}.weight"), r"no place \(\S*q_proj.weight"),
    "a wrapped linear": (stranger(f"{Q}.base_layer.weight"), r"no place \(\S*q_proj.base_layer.weight"),
    "a stranger": (stranger("foo"), r"no place \(\S*foo"),
    "a name of two lines": (stranger("foo\nbar"), r"no place \(\S*foo bar,"),
    "NaN": (filled(float("nan")), r"holds NaN or infinity in \S+moelora_B"),
    "infinity": (filled(float("-inf")), r"holds NaN or infinity in \S+moelora_B"),
    "int64": (first(lambda tensor: tensor.long()), r"moelora_B\S+ is torch.int64; allowed: torch.float16"),
    "bool": (first(lambda tensor: tensor.bool()), r"is torch.bool; allowed"),
    "fp8": (first(lambda tensor: tensor.to(torch.float8_e4m3fn)), r"is torch.float8_e4m3fn; allowed"),
    "another shape": (first(lambda tensor: tensor[:1].clone()), r"moelora_B\S+ is \[1, .* and should be"),
    "a tensor less": (tensors(lambda found: found.pop(next(iter(found)))), r"places get no tensor \(\S+, ...\)\. Al"),
    "no tensor of a linear": (without(Q), rf"2 places get no tensor \(\S+, ...\), all those of {Q}\."),
    "no tensor of a block": (without("model.layers.1.mlp"), r"get no tensor \(.*\), all those of model.layers.1.mlp\."),
    "no tensor of a layer": (
        without("model.layers.1"),
        r"all those of model.layers.1.mlp, \S+k_proj, \S+o_proj, \S+, \.",
    ),
    "half a file": (cut, "cannot be loaded: Error while deserializing header"),
    "no file": (lambda folder: (folder / WEIGHTS).unlink(), "has no weights; allowed: a folder with"),
    "no JSON": (lambda folder: (folder / CONFIG).write_bytes(b"\xff{"), "is not readable as JSON"),
    "a list": (lambda folder: (folder / CONFIG).write_text("[1]"), "not the configuration of an adapter"),
    "a whole module that is not there": (words(modules_to_save=["lm_head"]), "lack 'base_model.model.lm_head.weight'"),
    "tokens that are not there": (words(trainable_token_indices=[3]), "lack .*trainable_tokens_delta"),
    "no scores": (words(scores=None), "scores is None; allowed"),
    "too many experts": (words(experts__num_experts=10**9), "num_experts=1000000000 and r=3 make .* parameters, .* GB"),
    "more than an int": (words(experts__num_experts=10**30), "num_experts=1000000000000000000000000000000 and r=3"),
    "alpha 0": (words(experts__lora_alpha=0), "lora_alpha is 0; allowed: a positive number"),
    "a coefficient of 1e300": (words(balance=[{"kind": "switch", "coef": 1e300}]), "1e\\+300; allowed"),
    "lists of lists": (words(exclude_modules=[[1]]), r"exclude_modules is \[\[1\]\]; allowed: name endings"),
    "numbers for names": (words(modules_to_save=[5]), r"modules_to_save is \[5\]; allowed: a list of names"),
    "texts for tokens": (words(trainable_token_indices=["a"]), r"trainable_token_indices is \['a'\]; allowed"),
}


def view(model: Any) -> Any:
    found = snapshot(model)
    found["parameters"] = {name: (known[0], known[2]) for name, known in found["parameters"].items()}
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    adapted("mixlora").save_pretrained(folder, save_embedding_layers=False)
    return folder


def spoiled(saved: Path, place: Path, fault: str) -> tuple[Path, str]:
    for file in (WEIGHTS, CONFIG):
        (place / file).write_bytes((saved / file).read_bytes())
    change, message = FAULTS[fault]
    change(place)
    return place, message


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named_and_leaves_the_base_as_it_was(saved: Path, tmp_path: Path, fault: str) -> None:
    folder, message = spoiled(saved, tmp_path, fault)
    base = tiny_model()
    before, values = view(base), {name: tensor.clone() for name, tensor in base.state_dict().items()}
    with pytest.raises(MoeLoraError, match=message) as raised:
        PeftModel.from_pretrained(base, str(folder))
    assert "\n" not in str(raised.value)
    assert view(base) == before
    assert_equal_tensors(base.state_dict(), values)


@pytest.mark.parametrize("fault", ["no file", "half a file", "NaN", "too many experts", "an output head"])
def test_a_good_adapter_after_a_bad_one_is_right(saved: Path, tmp_path: Path, fault: str) -> None:
    base = tiny_model()
    with pytest.raises(MoeLoraError):
        PeftModel.from_pretrained(base, str(spoiled(saved, tmp_path, fault)[0]))
    assert torch.equal(outputs(PeftModel.from_pretrained(base, str(saved))), outputs(adapted("mixlora")))


@pytest.mark.parametrize("fault", ["no file", "NaN", "a norm", "a whole module that is not there", "too many experts"])
def test_a_bad_second_adapter_leaves_the_first(saved: Path, tmp_path: Path, fault: str) -> None:
    model = adapted("mixlora", adapter_name="first", seed=3)
    expected, kept, before = outputs(model), adapter_tensors(model), view(model)
    with pytest.raises(MoeLoraError):
        model.load_adapter(str(spoiled(saved, tmp_path, fault)[0]), adapter_name="second")
    assert list(model.peft_config) == ["first"]
    assert view(model) == before
    assert_equal_tensors(adapter_tensors(model), kept)
    assert torch.equal(outputs(model), expected)
    model.load_adapter(str(saved), adapter_name="second")
    model.set_adapter("second")
    assert torch.equal(outputs(model), outputs(adapted("mixlora")))


def test_bad_weights_do_not_overwrite_an_adapter_that_is_loaded_again(saved: Path, tmp_path: Path) -> None:
    model = adapted("mixlora", seed=3)
    expected = outputs(model)
    with pytest.raises(MoeLoraError, match="NaN or infinity"):
        model.load_adapter(str(spoiled(saved, tmp_path, "NaN")[0]), adapter_name="default")
    assert torch.equal(outputs(model), expected)


SWAPPED = (
    *("an output head", "a norm", "a linear", "a wrapped linear", "a stranger", "NaN", "infinity", "int64", "bool"),
    *("fp8", "another shape", "a tensor less", "no tensor of a linear", "no tensor of a layer"),
)


def test_a_hot_swap_takes_a_whole_adapter_or_leaves_the_old_one(saved: Path, tmp_path: Path) -> None:
    """PEFT zeroes what gets no tensor, and copies any value."""
    model = adapted("mixlora", seed=3)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for fault in SWAPPED:
        folder, message = spoiled(saved, tmp_path, fault)
        with pytest.raises(MoeLoraError, match=message):
            hotswap_adapter(model, str(folder), adapter_name="default", torch_device="cpu")
        assert_equal_tensors(model.state_dict(), kept)
    hotswap_adapter(model, str(saved), adapter_name="default", torch_device="cpu")
    assert torch.equal(outputs(model), outputs(adapted("mixlora")))


def test_a_hot_swap_of_more_than_experts_and_of_another_base_is_refused(tmp_path: Path) -> None:
    model = adapted("sira", "phi", seed=3)
    kept = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    more: dict[str, Any] = {"modules_to_save": ["lm_head"], "trainable_token_indices": [3], "bias": "all"}
    for word, value in more.items():
        adapted("sira", "phi", **{word: value}).save_pretrained(tmp_path / word)
        message = rf"experts and routers only, .* has {re.escape(f'{word}={value!r}')}; allowed: an adapter without"
        with pytest.raises(TargetError, match=message):
            hotswap_adapter(model, str(tmp_path / word), adapter_name="default", torch_device="cpu")
    other = tiny_model("phi")
    torch.nn.init.normal_(other.get_input_embeddings().weight)
    get_peft_model(other, small_config("sira")).save_pretrained(tmp_path / "other", save_embedding_layers=False)
    with pytest.raises(TargetError, match="not the one that the adapter was saved on"):
        hotswap_adapter(model, str(tmp_path / "other"), adapter_name="default", torch_device="cpu")
    assert_equal_tensors(model.state_dict(), kept)


def test_an_interrupted_load_leaves_the_base(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    base = tiny_model()
    before = view(base)
    monkeypatch.setattr("peft.peft_model.load_peft_weights", stop)
    with pytest.raises(KeyboardInterrupt):
        PeftModel.from_pretrained(base, str(saved))
    assert view(base) == before


@pytest.mark.parametrize("name", ["a" * 250, "ü" * 120, "a\0b", "a\nb", "a/b", "", "  "])
def test_names_that_no_folder_can_have(name: str) -> None:
    base = tiny_model()
    before = view(base)
    with pytest.raises(AdapterNameError, match="allowed: a name that a folder can have"):
        get_peft_model(base, small_config("sira"), adapter_name=name)
    assert view(base) == before


def test_an_adapter_that_no_memory_holds_is_refused_before_it_is_made() -> None:
    base = tiny_model()
    before = view(base)
    with pytest.raises(ConfigError, match="parameters, .* GB in float32; allowed: what fits into this machine"):
        get_peft_model(base, small_config("sira", num_experts=900_000, r=900_000))
    assert view(base) == before


def test_embeddings_of_a_vocabulary_that_has_grown(tmp_path: Path) -> None:
    """PEFT saves them with the adapter; new rows are taken, and rows that the base has stay the base's."""
    model = adapted("sira")
    model.get_base_model().resize_token_embeddings(100)
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    base = tiny_model()
    base.resize_token_embeddings(100)  # the new rows are drawn, and others
    old = base.get_input_embeddings().weight[:97].clone()
    with pytest.warns(UserWarning, match="brings its own rows of .* for the tokens from 97 on"):
        loaded = PeftModel.from_pretrained(base, str(tmp_path))
    assert torch.equal(loaded.get_input_embeddings().weight[:97], old)
    assert torch.equal(outputs(loaded), outputs(model))


def test_embeddings_that_are_the_bases_own_change_nothing(tmp_path: Path) -> None:
    model = adapted("sira")
    model.save_pretrained(tmp_path, save_embedding_layers=True)
    assert "base_model.model.lm_head.weight" in load_file(tmp_path / WEIGHTS)
    assert torch.equal(outputs(PeftModel.from_pretrained(tiny_model(), str(tmp_path))), outputs(model))


def test_biases_that_the_configuration_trains_must_be_there(tmp_path: Path) -> None:
    adapted("sira", "phi", bias="all").save_pretrained(tmp_path)
    tensors(lambda found: [found.pop(key) for key in list(found) if key.endswith("norm.bias")])(tmp_path)
    with pytest.raises(MoeLoraError, match=r"places get no tensor \(\S+norm.bias"):
        PeftModel.from_pretrained(tiny_model("phi"), str(tmp_path))


def test_other_methods_of_peft_keep_their_errors(tmp_path: Path) -> None:
    from peft import LoraConfig

    get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path)
    cut(tmp_path)
    with pytest.raises(Exception, match="deserializing header") as raised:
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert not isinstance(raised.value, AdapterFileError)
