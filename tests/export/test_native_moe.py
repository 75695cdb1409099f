"""An adapter on a dense base as a native MoE: the same logits and tokens, without moelora."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from moelora.export import NativeMoe, to_native_moe
from moelora.export.native_moe.targets import ROWS as MAP
from moelora.export.native_moe.targets import SHARED_EXPERT_SIZE
from tests.conftest import tiny_model
from tests.export.bases import (
    ROWS,
    TARGETS,
    make_base,
    observed,
    observed_without_moelora,
    save_pair,
    save_with_choices,
)
from tests.runs.tiny import tiny_tokenizer

Row = tuple[NativeMoe, dict[str, Tensor], Tensor, tuple[str, int, dict[str, Tensor]]]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Row]:
    """For each row the export, what the adapter computes, what the base computes, and what the export computes."""
    root = tmp_path_factory.mktemp("rows")
    made = {}
    for row in ROWS:
        model = save_pair(root / row, row)
        ours = observed(model)
        with model.disable_adapter():
            base = observed(model)["logits"]
        made[row] = to_native_moe(root / row / "adapter", root / row / "moe"), ours, base
    found = observed_without_moelora(*(moe.folder for moe, _, _ in made.values()))
    return {row: (*parts, found[parts[0].folder]) for row, parts in made.items()}


def loaded(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def assert_same(model: PeftModel, moe: NativeMoe, tolerance: float = 1e-4) -> None:
    """Logits and greedy tokens, in this process."""
    ours, native = observed(model), observed(loaded(moe.folder))
    assert (ours["logits"] - native["logits"]).abs().max() < tolerance
    assert torch.equal(ours["greedy"], native["greedy"])


def test_every_row_of_the_map_is_tested() -> None:
    assert {make_base(row).config.model_type for row in ROWS} == set(MAP)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_of_the_map_without_moelora(rows: dict[str, Row], row: str) -> None:
    moe, ours, base, (name, count, native) = rows[row]
    assert name == moe.architecture == TARGETS[row]
    assert (ours["logits"] - base).abs().max() > 0.1, "the adapter changes nothing, so that nothing is tested"
    assert (ours["logits"] - native["logits"]).abs().max() < 1e-4
    assert torch.equal(ours["greedy"], native["greedy"])
    assert count == moe.parameters
    assert moe.base_parameters == make_base(row).num_parameters()


@pytest.mark.parametrize("row", ROWS)
def test_the_configuration_says_what_the_base_says(rows: dict[str, Row], row: str) -> None:
    folder = rows[row][0].folder
    base, moe = AutoConfig.from_pretrained(folder.parent / "base"), AutoConfig.from_pretrained(folder)
    words = json.loads((folder / "config.json").read_text())
    for key in ("rms_norm_eps", "tie_word_embeddings", "hidden_act", "max_position_embeddings", "vocab_size"):
        assert words[key] == getattr(base, key), key
    assert words["head_dim"] == (getattr(base, "head_dim", None) or base.hidden_size // base.num_attention_heads)
    for key, value in base.rope_parameters.items():
        assert key == "partial_rotary_factor" or moe.rope_parameters[key] == value, key
    old = {"rope_type": "default", **words.get("rope_scaling", {}), "rope_theta": words["rope_theta"]}
    assert old == words["rope_parameters"], "engines that read the words of before transformers 5 find the same"
    assert words["num_experts" if row.startswith(("qwen", "olmo")) else "num_local_experts"] == 4
    assert words["num_experts_per_tok"] == 2
    assert words.get("norm_topk_prob", True) is True
    assert words["architectures"] == [TARGETS[row]]
    if row == "mistral":
        assert words["sliding_window"] == 5


def test_the_names_on_disk(rows: dict[str, Row]) -> None:
    def names(row: str) -> dict[str, Tensor]:
        return load_file(rows[row][0].folder / "model.safetensors")

    mixtral = names("smollm2")
    assert mixtral["model.layers.0.block_sparse_moe.gate.weight"].shape == (4, 36)
    for e in range(4):
        for name, shape in (("w1", (52, 36)), ("w3", (52, 36)), ("w2", (36, 52))):
            assert mixtral[f"model.layers.1.block_sparse_moe.experts.{e}.{name}.weight"].shape == shape
    assert torch.equal(mixtral["lm_head.weight"], mixtral["model.embed_tokens.weight"]), "a tied head is written too"
    assert not any(".mlp." in name for name in mixtral)
    assert names("phi3").keys() == mixtral.keys(), "qkv and gate_up are split"
    for row in ("qwen2", "qwen3", "olmo2"):
        found = names(row)
        assert found["model.layers.0.mlp.gate.weight"].shape == (4, 36)
        assert found["model.layers.0.mlp.experts.3.down_proj.weight"].shape == (36, 52)
    shared = {name: each for name, each in names("qwen2").items() if "shared_expert" in name}
    assert len(shared) == 2 * 4
    for name, tensor in shared.items():
        # a gate of 0 would be 0 / 0 in engines that compute a sigmoid as silu(x) / x
        assert bool(tensor.all()) if "shared_expert_gate" in name else not tensor.any(), name
    granite = names("granite")
    assert granite["model.layers.0.block_sparse_moe.input_linear.weight"].shape == (4, 104, 36)
    assert granite["model.layers.0.block_sparse_moe.output_linear.weight"].shape == (4, 36, 52)
    assert granite["model.layers.0.block_sparse_moe.router.layer.weight"].shape == (4, 36)


def test_the_shared_expert_of_a_real_qwen2_is_small() -> None:
    assert SHARED_EXPERT_SIZE == 256


VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "shared A": ("llama", "mixlora", {}),
    "frozen router": ("llama", "random_router", {}),
    "rslora": ("llama", "mixlora", {"use_rslora": True}),
    "raw top-1": ("qwen3", "mixlora", {"top_k": 1}),
    "raw top-1 beside a shared expert": ("qwen2", "mixlora", {"top_k": 1}),
    "raw top-2": ("olmo2", "mixlora", {"renormalize": False}),
    "all experts": ("llama", "mixlora", {"top_k": 4, "renormalize": False}),
    "one expert": ("granite", "mixlora", {"num_experts": 1, "top_k": 1}),
    "down alone": ("qwen2", "mixlora", {"target_modules": ["down_proj", "v_proj"]}),
    "gate_up alone": ("phi3", "mixlora", {"target_modules": ["gate_up_proj"]}),
    "no attention": ("llama", "mixlora", {"target_modules": ["gate_proj", "up_proj", "down_proj"]}),
    "one layer of two": ("llama", "mixlora", {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]}),
    "one layer, stacked": ("granite", "mixlora", {"target_modules": ["up_proj"], "layers_to_transform": [0]}),
    "one layer, dense": ("qwen3", "mixlora", {"target_modules": ["up_proj", "o_proj"], "layers_to_transform": [1]}),
    "one layer, qwen2": ("qwen2", "mixlora", {"target_modules": ["up_proj"], "layers_to_transform": [0]}),
    "one layer, split": ("phi3", "mixlora", {"target_modules": ["gate_up_proj"], "layers_to_transform": [0]}),
    "biases": ("qwen2", "mixlora", {"bias": "all"}),
    "biases of attention": ("llama_attention_bias", "mixlora", {"bias": "moelora_only"}),
    "head saved whole": ("llama", "mixlora", {"modules_to_save": ["lm_head"]}),
    "tied head saved whole": ("smollm2", "mixlora", {"modules_to_save": ["lm_head"]}),
    "embedding saved whole": ("llama", "mixlora", {"modules_to_save": ["embed_tokens"]}),
    "tied embedding saved whole": ("smollm2", "mixlora", {"modules_to_save": ["embed_tokens"]}),
    "norms saved whole": ("qwen3", "mixlora", {"modules_to_save": ["input_layernorm", "q_norm", "model.norm"]}),
    "head adapted": ("llama", "mixlora", {"target_modules": ["up_proj", "lm_head"]}),
    "tied head adapted": ("smollm2", "mixlora", {"target_modules": ["up_proj", "lm_head"]}),
    "tokens": ("llama", "mixlora", {"trainable_token_indices": [50, 7, 11]}),
    "tokens of a tied embedding": ("smollm2", "mixlora", {"trainable_token_indices": [50, 7, 11]}),
    "tokens by name": ("qwen2", "mixlora", {"trainable_token_indices": {"embed_tokens": [9, 4]}}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(tmp_path: Path, variant: str) -> None:
    row, preset, words = VARIANTS[variant]
    if variant == "shared A":
        model = save_with_choices(
            tmp_path, row, experts={"kind": "lora_shared_a", "num_experts": 4, "r": 3, "lora_alpha": 4}
        )
    else:
        model = save_pair(tmp_path, row, preset, **words)
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    assert_same(model, moe)


@pytest.mark.parametrize(
    "selection",
    [
        {"kind": "top_k", "k": 2, "expert_dropout": 0.4},
        {"kind": "top_k", "k": 3, "capacity_factor": 1.0},
    ],
)
def test_what_holds_in_training_only_does_not_matter(tmp_path: Path, selection: dict[str, Any]) -> None:
    model = save_with_choices(tmp_path, selection=selection)
    assert_same(model, to_native_moe(tmp_path / "adapter", tmp_path / "moe"))


def test_layers_without_a_mixture_are_said(tmp_path: Path) -> None:
    words: dict[str, Any] = {"target_modules": ["up_proj"], "layers_to_transform": [1]}
    save_pair(tmp_path / "a", "llama", **words)
    moe = to_native_moe(tmp_path / "a" / "adapter", tmp_path / "a" / "moe")
    (note, _) = moe.notes
    assert "Layers without a mixture (0) have 4 equal experts and a router of zeros" in note
    assert note in (moe.folder / "README.md").read_text()
    save_pair(tmp_path / "b", "qwen3", **words)
    moe = to_native_moe(tmp_path / "b" / "adapter", tmp_path / "b" / "moe")
    assert moe.notes[0] == "Layers without a mixture stay dense: 0."
    assert AutoConfig.from_pretrained(moe.folder).mlp_only_layers == [0]


def test_a_tensor_that_is_frozen_in_part_is_stored_in_two_pieces(tmp_path: Path) -> None:
    save_pair(tmp_path)
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "whole")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    split: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        if ".mlp.moelora_" in name:
            split |= {f"{name}_frozen": tensor[:1].contiguous(), name: tensor[1:].contiguous()}
        else:
            split[name] = tensor
    save_file(split, file, metadata={"format": "pt"})
    pieces = to_native_moe(tmp_path / "adapter", tmp_path / "pieces")
    found = load_file(pieces.folder / "model.safetensors")
    for name, tensor in load_file(moe.folder / "model.safetensors").items():
        assert torch.equal(found[name], tensor), name


def test_an_adapter_of_format_version_1(tmp_path: Path) -> None:
    folder = Path(__file__).parents[1] / "formats" / "version_1" / "mixlora"
    model = PeftModel.from_pretrained(tiny_model("llama"), folder).eval()
    moe = to_native_moe(folder, tmp_path / "moe", base=tiny_model("llama"))
    assert_same(model, moe)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_once(tmp_path: Path, dtype: str) -> None:
    save_pair(tmp_path, "qwen3")
    exact = load_file(to_native_moe(tmp_path / "adapter", tmp_path / "exact").folder / "model.safetensors")
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "half", dtype=dtype)
    found = load_file(moe.folder / "model.safetensors")
    for name, tensor in exact.items():
        assert torch.equal(found[name], tensor.to(getattr(torch, dtype))), name
    assert AutoModelForCausalLM.from_pretrained(moe.folder).dtype == getattr(torch, dtype)
    assert moe.num_bytes == sum(tensor.nbytes for tensor in found.values())


def test_the_dtype_is_the_bases(tmp_path: Path) -> None:
    save_pair(tmp_path)
    make_base().to(torch.bfloat16).save_pretrained(tmp_path / "base")
    assert to_native_moe(tmp_path / "adapter", tmp_path / "moe").dtype == "bfloat16"


@pytest.mark.parametrize("row", ["llama", "granite"])
def test_shards(tmp_path: Path, row: str) -> None:
    model = save_pair(tmp_path, row)
    make_base(row).save_pretrained(tmp_path / "base", max_shard_size="30KB")
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe", max_shard_size="40KB")
    files = [moe.folder / name for name in moe.files]
    assert len(files) > 3
    assert sorted(files) == sorted(moe.folder.glob("*.safetensors"))
    index = json.loads((moe.folder / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == moe.num_bytes
    for name, file in index["weight_map"].items():
        assert name in load_file(moe.folder / file)
    largest = max(tensor.nbytes for file in files for tensor in load_file(file).values())
    assert all(sum(t.nbytes for t in load_file(file).values()) <= max(40_000, largest) for file in files)
    assert_same(model, moe)


def test_a_model_in_memory_is_a_base(tmp_path: Path) -> None:
    model = save_pair(tmp_path, "smollm2")
    base = make_base("smollm2")
    base.generation_config.max_new_tokens = 17
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe", base=base, tokenizer=tiny_tokenizer())
    assert_same(model, moe)
    assert json.loads((moe.folder / "generation_config.json").read_text())["max_new_tokens"] == 17
    assert len(AutoTokenizer.from_pretrained(moe.folder)) == len(tiny_tokenizer())
    assert moe.notes == ()


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_the_tokenizer_and_the_generation_config_come_along(tmp_path: Path, place: str) -> None:
    save_pair(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / place)
    (tmp_path / "base" / "generation_config.json").write_text('{"temperature": 0.25, "do_sample": true}')
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    tokenizer = AutoTokenizer.from_pretrained(moe.folder)
    text = "Ein Satz, 42 Wörter. <|user|>"
    assert tokenizer(text).input_ids == tiny_tokenizer()(text).input_ids
    assert tokenizer.chat_template == tiny_tokenizer().chat_template
    assert json.loads((moe.folder / "generation_config.json").read_text())["temperature"] == 0.25
    assert not any("tokenizer" in note for note in moe.notes)


def test_the_card_names_no_folder(tmp_path: Path) -> None:
    save_pair(tmp_path, "qwen2")
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    card = (moe.folder / "README.md").read_text()
    assert str(tmp_path) not in card
    assert "llama.cpp's `qwen2moe` never renormalises" in card
    assert f"{moe.parameters:,}" in card
    assert "4 per block, 2 per token" in card


def test_an_adapter_and_a_base_on_the_hub(tmp_path: Path, hub: Any) -> None:
    model = save_pair(tmp_path)
    make_base().push_to_hub("tester/base")
    model.push_to_hub("tester/adapter")
    moe = to_native_moe("tester/adapter", tmp_path / "moe", base="tester/base")
    assert_same(model, moe)
    assert "base_model: tester/base" in (moe.folder / "README.md").read_text()
