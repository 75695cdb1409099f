"""What a native MoE cannot say is refused by name, and bad input leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from safetensors.torch import load_file, save_file

from moelora import choices
from moelora.errors import ExportError, HubError, MoeLoraError
from moelora.experts.lora import LoraExperts
from moelora.export import safetensors_writer, to_native_moe
from moelora.export.native_moe.targets import REASONS, ROWS, find_target
from tests.adapters import BLOCK_PRESETS, PRESETS, small_config
from tests.conftest import tiny_model
from tests.export.bases import make_base, save_pair, save_with_choices


def refused(folder: Path, match: str, error: type[MoeLoraError] = ExportError, **words: Any) -> None:
    """The export of the pair in `folder` fails with one line and leaves nothing."""
    before = sorted(path.name for path in folder.iterdir())
    with pytest.raises(error, match=match) as raised:
        to_native_moe(folder / "adapter", folder / "moe", **words)
    assert "\n" not in str(raised.value)
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"selection": "dense"}, "selection is 'dense'.*all experts.*'top_k' with k = num_experts is the same"),
        ({"selection": "learned_threshold"}, "selection is 'learned_threshold'.*a threshold of its own"),
        ({"scores": {"kind": "linear", "activation": "sigmoid"}}, "scores with activation is 'sigmoid'"),
        ({"scores": {"kind": "linear", "bias": True}}, "scores with bias is True"),
        ({"selection": {"kind": "top_k", "k": 2, "renormalize": False}}, "renormalize is False.*MixtralForCausalLM"),
        (
            {"selection": {"kind": "top_k", "k": 2, "capacity_factor": 1.0, "capacity_in_eval": True}},
            "selection with capacity_in_eval is True",
        ),
        (
            {"placement": {"kind": "feed_forward", "unrouted_modules": None}},
            "linear '.*_proj' has a mixture of its own",
        ),
    ],
)
def test_routing_that_no_native_moe_has(tmp_path: Path, words: dict[str, Any], match: str) -> None:
    save_with_choices(tmp_path, **words)
    refused(tmp_path, match)


@pytest.mark.parametrize("row", ["llama", "smollm2", "mistral", "granite", "llama_attention_bias", "phi3"])
def test_raw_weights_where_the_target_renormalises(tmp_path: Path, row: str) -> None:
    save_pair(tmp_path, row, top_k=1)
    refused(tmp_path, "renormalize is False.*always renormalises")


@pytest.mark.parametrize("preset", sorted(set(PRESETS) - set(BLOCK_PRESETS)))
def test_presets_with_a_mixture_on_each_linear(tmp_path: Path, preset: str) -> None:
    save_pair(tmp_path, "llama", preset)
    refused(tmp_path, "placement is 'linear'.*only whole feed-forward blocks are routed")


def test_experts_that_are_no_lora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind that comes later is refused until somebody says that it is one."""
    save_pair(tmp_path)
    monkeypatch.setattr(LoraExperts, "kind", "dora")
    monkeypatch.setattr("moelora.choices._KINDS", {**choices._KINDS, "experts": {"lora": LoraExperts}})
    refused(tmp_path, r"experts is 'dora'.*W \+ scaling B A")


def test_another_task(tmp_path: Path) -> None:
    model = get_peft_model(tiny_model("bert"), small_config("mixlora", "bert"))
    model.save_pretrained(tmp_path / "adapter")
    tiny_model("llama").save_pretrained(tmp_path / "base")
    refused(tmp_path, "task_type is 'SEQ_CLS'", base=tmp_path / "base")


UNKNOWN: dict[str, tuple[Callable[[], Any], str]] = {
    "gemma2": (lambda: tiny_model("gemma2"), "norms behind them"),
    "gemma3_text": (lambda: tiny_model("gemma3_text"), "norms behind them"),
    "gpt2": (lambda: tiny_model("gpt2"), "two linears"),
    "phi": (lambda: tiny_model("phi"), "two linears"),
    "smollm3": (lambda: _of("SmolLM3"), r"no positional encoding \(NoPE\)"),
    "ministral": (lambda: _of("Ministral"), "sliding window alternate"),
    "ministral3": (lambda: _of("Ministral3"), "scales its queries"),
    "olmo": (lambda: _of("Olmo"), "no native MoE architecture is known"),
    "phi4_mini": (
        lambda: tiny_model(
            "phi3", rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
        ),
        r"rotates a part of each head only \(partial_rotary_factor is 0.5\)",
    ),
    "llama_mlp_bias": (lambda: tiny_model("llama", mlp_bias=True), r"biases \(mlp_bias\)"),
    "granite_mlp_bias": (lambda: _of("Granite", mlp_bias=True), r"biases \(mlp_bias\)"),
    "qwen3_alternating": (
        lambda: tiny_model("qwen3", use_sliding_window=True, sliding_window=4, max_window_layers=1),
        "sliding window alternate .*max_window_layers is 1",
    ),
}


def _of(name: str, **words: Any) -> Any:
    sizes = {"vocab_size": 97, "hidden_size": 36, "intermediate_size": 52, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**{**sizes, **heads, **words})
    return getattr(transformers, f"{name}ForCausalLM")(config)


@pytest.mark.parametrize("base", UNKNOWN)
def test_bases_without_a_native_twin(tmp_path: Path, base: str) -> None:
    make, match = UNKNOWN[base]
    save_pair(tmp_path)
    make().save_pretrained(tmp_path / "other")
    refused(tmp_path, f"is no native MoE: .*{match}.*Allowed: {', '.join(ROWS)}", base=tmp_path / "other")


def test_every_reason_is_of_a_type_without_a_row() -> None:
    assert not REASONS.keys() & ROWS.keys()
    for model_type in REASONS:
        with pytest.raises(ExportError, match=f"a '{model_type}' with mixtures"):
            find_target(SimpleNamespace(model_type=model_type))


def test_a_layer_without_a_mixture_and_raw_weights(tmp_path: Path) -> None:
    save_pair(tmp_path, "olmo2", target_modules=["up_proj"], layers_to_transform=[1], renormalize=False)
    refused(tmp_path, r"layers \[0\] have no mixture and the weights are not renormalised")


# bad input


def test_another_base(tmp_path: Path) -> None:
    save_pair(tmp_path)
    tiny_model("llama", intermediate_size=48).save_pretrained(tmp_path / "wide")
    refused(
        tmp_path,
        "does not fit the base model: A and B of model.layers.0.mlp.* its configuration names",
        base=tmp_path / "wide",
    )
    tiny_model("llama", num_hidden_layers=1).save_pretrained(tmp_path / "short")
    refused(tmp_path, "it adapts 'model.layers.1", base=tmp_path / "short")
    tiny_model("phi3").save_pretrained(tmp_path / "phi3")
    refused(tmp_path, "gate, which the base has in one linear with up", base=tmp_path / "phi3")


def test_an_embedding_of_another_size(tmp_path: Path) -> None:
    save_pair(tmp_path, modules_to_save=["embed_tokens"])
    tiny_model("llama", vocab_size=90).save_pretrained(tmp_path / "small")
    refused(tmp_path, r"embed_tokens.weight is \[97, 36\] in it and \[90, 36\]", base=tmp_path / "small")


def test_tokens_of_a_tied_embedding_beside_an_adapted_head(tmp_path: Path) -> None:
    save_pair(tmp_path, "smollm2", target_modules=["up_proj"], trainable_token_indices=[5])
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = {**load_file(file), "base_model.model.lm_head.weight": torch.zeros(97, 36)}
    save_file(weights, file, metadata={"format": "pt"})
    refused(tmp_path, "an embedding that is tied to the head")


def test_an_adapter_that_names_no_base(tmp_path: Path) -> None:
    save_pair(tmp_path)
    _edit(tmp_path / "adapter" / "adapter_config.json", base_model_name_or_path=None)
    refused(tmp_path, "does not name its base model; give it as base")


def test_no_adapter(tmp_path: Path) -> None:
    save_pair(tmp_path)
    shutil.rmtree(tmp_path / "adapter")
    refused(tmp_path, "there is no folder", HubError)
    (tmp_path / "adapter").mkdir()
    refused(tmp_path, "holds no adapter", HubError)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda base: shutil.rmtree(base), "there is no folder"),
        (lambda base: (base / "config.json").unlink(), "no readable config.json"),
        (lambda base: (base / "config.json").write_text("{"), "no readable config.json"),
        (lambda base: (base / "model.safetensors").unlink(), "lacks model.safetensors"),
        (lambda base: (base / "model.safetensors").write_bytes(b"x" * 99), "not a readable safetensors file"),
        (lambda base: _cut(base / "model.safetensors"), "not a readable safetensors file"),
        (lambda base: _edit(base / "config.json", num_hidden_layers=3), "lack model.layers.2"),
        (lambda base: _edit(base / "config.json", num_hidden_layers=1), "have the unknown model.layers.1"),
        (lambda base: _edit(base / "config.json", vocab_size=50), "have another shape of lm_head.weight"),
        (lambda base: _edit(base / "config.json", quantization_config={"quant_method": "x"}), "is quantised"),
        (lambda base: (base / "tokenizer_config.json").write_text("{"), "the tokenizer in .* cannot be read"),
    ],
)
def test_a_damaged_base(tmp_path: Path, damage: Callable[[Path], Any], match: str) -> None:
    save_pair(tmp_path)
    damage(tmp_path / "base")
    refused(tmp_path, match)


def test_a_shard_is_missing(tmp_path: Path) -> None:
    save_pair(tmp_path)
    shutil.rmtree(tmp_path / "base")
    make_base().save_pretrained(tmp_path / "base", max_shard_size="30KB")
    missing = next((tmp_path / "base").glob("*-00002-of-*"))
    missing.unlink()
    refused(tmp_path, f"lacks {missing.name}")


def test_a_base_with_an_adapter_or_of_another_kind(tmp_path: Path) -> None:
    model = save_pair(tmp_path)
    refused(tmp_path, "carries an adapter", base=model.get_base_model())
    refused(tmp_path, "the base is a Linear", base=torch.nn.Linear(2, 2))


def test_the_place_is_taken(tmp_path: Path) -> None:
    save_pair(tmp_path)
    (tmp_path / "moe").mkdir()
    to_native_moe(tmp_path / "adapter", tmp_path / "moe")  # an empty folder is free
    before = (tmp_path / "moe" / "model.safetensors").stat()
    refused(tmp_path, "exists; allowed")
    assert (tmp_path / "moe" / "model.safetensors").stat() == before
    (tmp_path / "file").touch()
    with pytest.raises(ExportError, match="exists"):
        to_native_moe(tmp_path / "adapter", tmp_path / "file")
    with pytest.raises(ExportError, match="cannot write"):
        to_native_moe(tmp_path / "adapter", tmp_path / "file" / "moe")


def test_no_space(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pair(tmp_path)
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("shutil.disk_usage", lambda place: usage)
    refused(tmp_path, "GB left; allowed: as much or less")


def test_a_disk_that_fills_up_on_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_pair(tmp_path)
    write = safetensors_writer._write

    def full(file: Path, tensors: Any, dtype: str) -> None:
        write(file, tensors, dtype)
        if "00003" in file.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(safetensors_writer, "_write", full)
    refused(tmp_path, "cannot write .*No space left on device.*Nothing is left", max_shard_size="40KB")


def test_values_that_are_not_finite(tmp_path: Path) -> None:
    save_pair(tmp_path)
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(file)
    name = "base_model.model.model.layers.1.mlp.moelora_B.down"
    weights[name][2, 0, 0] = 1e6
    save_file(weights, file, metadata={"format": "pt"})
    refused(
        tmp_path,
        r"layers.1.block_sparse_moe.experts.2.w2.weight has values that are not finite in float16",
        dtype="float16",
    )


@pytest.mark.parametrize("words", [{"dtype": "int8"}, {"max_shard_size": "much"}, {"max_shard_size": "0GB"}])
def test_words_out_of_range(tmp_path: Path, words: dict[str, Any]) -> None:
    save_pair(tmp_path)
    refused(tmp_path, f"{next(iter(words))} is '.*'; allowed", **words)


def _edit(file: Path, **words: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **words}))


def _cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-500])
