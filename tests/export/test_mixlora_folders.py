"""Folders of MixLoRA's authors, in both directions against PyPI mixlora 0.2.3."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForCausalLM

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, ExportError, MoeLoraError
from moelora.export import read_mixlora, write_mixlora
from tests.adapters import adapted, assert_equal_tensors, outputs
from tests.conftest import tiny_model
from tests.export.mixtures import base_folder, saved

mixlora = pytest.importorskip("mixlora")

NAMES = ("llama", "gemma2", "qwen2", "mistral", "phi", "phi3")
LINEARS = {
    "llama": (["q_proj", "o_proj"], ["gate_proj", "up_proj", "down_proj"]),
    "gemma2": (["k_proj"], ["gate_proj", "down_proj"]),
    "qwen2": ([], ["up_proj"]),
    "mistral": (["v_proj"], ["gate_proj", "up_proj", "down_proj"]),
    "phi": (["q_proj", "dense"], ["fc1", "fc2"]),
    "phi3": (["qkv_proj"], ["gate_up_proj", "down_proj"]),
}


def their_model(folder: Path) -> Any:
    """A folder loaded by their package, without the dropout that it leaves on."""
    model, config = mixlora.MixLoraModelForCausalLM.from_pretrained(str(folder))
    model.eval()
    for layer in model.model.layers:
        for expert in layer.mlp.mixlora_moes[config.adapter_name].experts_.values():
            expert.eval()
    return model


def their_folder(folder: Path, base: Path, name: str, **words: Any) -> Path:
    """A folder as their code exports it, with random tensors of the sizes that the base has."""
    attention, block = LINEARS[name]
    config = mixlora.MixLoraConfig.from_config(
        {
            "base_model_name_or_path": str(base),
            "task_type": "CAUSAL_LM",
            "peft_type": "MIXLORA",
            "routing_strategy": "mixlora",
            "r": 3,
            "lora_alpha": 7,
            "lora_dropout": 0.05,
            "target_modules": [*attention, *block],
            "num_experts": 4,
            "top_k": 2,
            "act_fn": {"gemma2": "gelu_pytorch_tanh", "phi": "gelu_new"}.get(name, "silu"),
            **words,
        }
    )
    generator = torch.Generator().manual_seed(0)
    weights: dict[str, Tensor] = {}

    def add(key: str, *shape: int) -> None:
        weights[f"{key}.weight"] = torch.randn(*shape, generator=generator) * 0.2

    for index, layer in enumerate(tiny_model(name).model.layers):
        for linear in attention:
            sizes = getattr(layer.self_attn, linear).weight.shape
            add(f"mixlora.layers.{index}.self_attn.{linear}.lora_A", 3, sizes[1])
            add(f"mixlora.layers.{index}.self_attn.{linear}.lora_B", sizes[0], 3)
        add(f"mixlora.layers.{index}.mlp.moe_gate", 4, 36)
        for linear in block:
            sizes = getattr(layer.mlp, linear).weight.shape
            for expert in range(4):
                add(f"mixlora.layers.{index}.mlp.{linear}.experts.{expert}.lora_A", 3, sizes[1])
                add(f"mixlora.layers.{index}.mlp.{linear}.experts.{expert}.lora_B", sizes[0], 3)
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(config.check().export()))
    torch.save(weights, folder / "adapter_model.bin")
    return folder


def our_model(base: Path, folder: Path) -> Any:
    return PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder).eval()


@pytest.mark.parametrize("form", ["model", "folder"])
@pytest.mark.parametrize("name", NAMES)
def test_what_we_write_their_package_reads(tmp_path: Path, name: str, form: str) -> None:
    base = base_folder(tmp_path / "base", name)
    model = adapted("mixlora", name, lora_alpha=7, use_rslora=name == "phi", top_k=3)
    adapter = model if form == "model" else saved(model, tmp_path / "adapter")
    write_mixlora(adapter, tmp_path / "out", base=str(base))
    found, expected = outputs(their_model(tmp_path / "out"), name), outputs(model, name)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - outputs(tiny_model(name), name)).abs().max() > 1e-2


@pytest.mark.parametrize("name", NAMES)
def test_what_they_write_we_read(tmp_path: Path, name: str) -> None:
    base = base_folder(tmp_path / "base", name)
    theirs = their_folder(tmp_path / "theirs", base, name, use_rslora=name == "llama")
    read_mixlora(theirs, tmp_path / "out")
    model = our_model(base, tmp_path / "out")
    found, expected = outputs(model, name), outputs(their_model(theirs), name)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
    assert (expected - outputs(tiny_model(name), name)).abs().max() > 1e-2
    config = model.peft_config["default"]
    assert (config.preset, config.experts.lora_dropout, config.balance[0].kind) == ("mixlora", 0.05, "mixtral")
    assert config.base_model_name_or_path == str(base)


def test_there_and_back_is_the_same_adapter(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    words: dict[str, Any] = {"balance_loss": "mixtral", "balance_coef": 0.003, "router_init_std": 0.5}
    model = adapted("mixlora", target_modules=["q_proj", "up_proj", "gate_proj"], **words)
    write_mixlora(model, tmp_path / "theirs", base=str(base))
    read_mixlora(tmp_path / "theirs", tmp_path / "ours")
    again = our_model(base, tmp_path / "ours")
    assert_equal_tensors(
        {name: tensor for name, tensor in again.state_dict().items() if "moelora_" in name},
        {name: tensor for name, tensor in model.state_dict().items() if "moelora_" in name},
    )
    before, after = (each.peft_config["default"] for each in (model, again))
    for axis in ("experts", "placement", "scores", "selection", "target_modules"):
        assert getattr(after, axis) == getattr(before, axis), axis
    assert after.balance[0] == before.balance[0]


def test_pickles_that_hold_code_are_not_run(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    theirs = their_folder(tmp_path / "theirs", base, "llama")

    class Trap:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "ran",))

    (theirs / "adapter_model.bin").write_bytes(
        pickle.dumps({"mixlora.layers.0.mlp.moe_gate.weight": Trap()}, protocol=2)
    )
    with pytest.raises(ExportError, match="weights_only=True"):
        read_mixlora(theirs, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "theirs"]


UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "dynamic": ({"routing_strategy": "mixlora-dynamic", "top_p": 0.8}, r"'mixlora-dynamic' \(top-p\)"),
    "switch": ({"routing_strategy": "mixlora-switch"}, "routing_strategy is 'mixlora-switch'"),
    "another method": ({"peft_type": "LORA"}, "peft_type is 'LORA'"),
    "dora": ({"use_dora": True}, "use_dora"),
    "jitter": ({"jitter_noise": 0.1}, "jitter_noise"),
    "experts of another alpha": ({"expert_lora": {"r": 3, "lora_alpha": 9}}, "expert_lora .*'lora_alpha': 9"),
    "k": ({"top_k": 5}, "top_k .* is 5; allowed: 1 to num_experts"),
    "an unknown word": ({"lora_bias": True}, "unknown key 'lora_bias'"),
    "a target without weights in their list": ({"target_modules": ["q_proj", "up_proj"]}, "do not list"),
    "more experts": ({"num_experts": 5}, "lacks mixlora.layers.0.mlp.down_proj.experts.4.lora_A.weight"),
    "fewer experts": ({"num_experts": 3}, "has no place"),
    "another rank": ({"r": 4}, "allowed: two dimensions, a factor's rank 4"),
    "another activation": ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
    "no base": ({"base_model_name_or_path": None}, "does not record its base model"),
    "no such base": ({"base_model_name_or_path": "./none"}, "'./none' cannot be read"),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_cannot_be_read_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    base = base_folder(tmp_path / "base")
    theirs = their_folder(tmp_path / "theirs", base, "llama")
    changes, message = UNREADABLE[case]
    words = {**json.loads((theirs / "adapter_config.json").read_text()), **changes}
    (theirs / "adapter_config.json").write_text(json.dumps(words))
    with pytest.raises((ExportError, ConfigError), match=message):
        read_mixlora(theirs, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "theirs"]


def test_expert_words_that_say_the_same_are_read(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    theirs = their_folder(tmp_path / "theirs", base, "llama", expert_lora={"r": 3, "lora_alpha": 7})
    words = json.loads((theirs / "adapter_config.json").read_text())
    assert words["expert_lora"]["lora_alpha"] == 7
    words["target_modules"] = dict.fromkeys(words["target_modules"], True) | {"fc1": False}
    (theirs / "adapter_config.json").write_text(json.dumps(words))
    read_mixlora(theirs, tmp_path / "out")
    torch.testing.assert_close(
        outputs(our_model(base, tmp_path / "out")), outputs(their_model(theirs)), atol=1e-4, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "adapter_model.bin").unlink(), "there is no .*adapter_model.bin"),
        (lambda folder: (folder / "adapter_config.json").unlink(), "adapter_config.json"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "not a readable JSON"),
        (lambda folder: (folder / "adapter_model.bin").write_bytes(b"PK\x03\x04"), "cut off"),
        (lambda folder: torch.save([1], folder / "adapter_model.bin"), "holds a list"),
    ],
)
def test_damaged_folders_are_refused(tmp_path: Path, damage: Any, message: str) -> None:
    theirs = their_folder(tmp_path / "theirs", base_folder(tmp_path / "base"), "llama")
    damage(theirs)
    with pytest.raises(ExportError, match=message):
        read_mixlora(theirs, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_base_is_refused(tmp_path: Path) -> None:
    theirs = their_folder(tmp_path / "theirs", base_folder(tmp_path / "base"), "llama")
    tiny_model("llama", hidden_size=48).save_pretrained(tmp_path / "wider")
    base_folder(tmp_path / "phi", "phi")
    for other in ("wider", "phi"):
        with pytest.raises(MoeLoraError):
            read_mixlora(theirs, tmp_path / "out", base=str(tmp_path / other))
        assert not (tmp_path / "out").exists()


INEXPRESSIBLE: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "another preset": ("sira", "llama", {}, "placement 'linear'"),
    "mixtures on attention": (
        "mixlora",
        "llama",
        {"unrouted_modules": None},
        "a mixture on a linear 'model.layers.0.self_attn.q_proj",
    ),
    "raw weights": ("mixlora", "llama", {"top_k": 1}, "renormalize=False.*allowed: top_k with renormalize=True"),
    "half an alpha": ("mixlora", "llama", {"lora_alpha": 1.5}, "lora_alpha 1.5"),
    "another architecture": ("mixlora", "qwen3", {}, "'qwen3'; allowed, as in MixLoRA's code: llama"),
    "some layers": (
        "mixlora",
        "llama",
        {"layers_to_transform": [1], "target_modules": ["up_proj", "q_proj"]},
        "layers 1 of 2",
    ),
    "a linear of other names": (
        "mixlora",
        "llama",
        {"target_modules": ["up_proj", "lm_head"]},
        "no place for 'lm_head'",
    ),
    "more than experts": ("mixlora", "llama", {"modules_to_save": ["lm_head"]}, "modules_to_save"),
}


@pytest.mark.parametrize("case", INEXPRESSIBLE)
def test_what_cannot_be_written_is_refused_and_leaves_nothing(tmp_path: Path, case: str) -> None:
    preset, name, words, message = INEXPRESSIBLE[case]
    if "unrouted_modules" in words:
        words = {}
        model = _mixtures_on_attention()
    else:
        model = adapted(preset, name, **words)
    with pytest.raises(ExportError, match=message):
        write_mixlora(model, tmp_path / "out", base="some/base")
    assert list(tmp_path.iterdir()) == []


def _mixtures_on_attention() -> Any:
    from peft import get_peft_model

    words = MoeLoraConfig.from_preset("mixlora", r=3, num_experts=4).to_dict()
    fields = {axis: words[axis] for axis in ("experts", "scores", "selection", "balance")}
    placement = {"kind": "feed_forward", "unrouted_modules": None}
    return get_peft_model(tiny_model(), MoeLoraConfig(**fields, placement=placement, task_type="CAUSAL_LM"))


def test_a_dropout_of_nothing_stays_nothing(tmp_path: Path) -> None:
    """Their code refuses 0; what is written drops nothing, and is read as 0."""
    base = base_folder(tmp_path / "base")
    write_mixlora(adapted("mixlora"), tmp_path / "theirs", base=str(base))
    assert 0 < json.loads((tmp_path / "theirs" / "adapter_config.json").read_text())["lora_dropout"] <= 1e-9
    model, _ = mixlora.MixLoraModelForCausalLM.from_pretrained(str(tmp_path / "theirs"))
    torch.testing.assert_close(outputs(model), outputs(their_model(tmp_path / "theirs")), atol=1e-6, rtol=1e-6)
    read_mixlora(tmp_path / "theirs", tmp_path / "ours")
    assert MoeLoraConfig.from_pretrained(str(tmp_path / "ours")).experts.lora_dropout == 0
