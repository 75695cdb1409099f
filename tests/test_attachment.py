"""Only what a forward reaches gets an adapter: the rest is left out of "all-linear" and refused by name."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from peft import get_peft_model
from torch import Tensor, nn
from transformers import SiglipVisionConfig, SiglipVisionModel

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from tests.adapters import PRESETS, shake, small_config, snapshot, task_type, tuner_layers
from tests.conftest import VOCAB, tiny_batch, tiny_model
from tests.llava import tiny_llava


def assert_refused(base: nn.Module, config: MoeLoraConfig, message: str, error: Any = TargetError) -> None:
    """The message names the place, and the model is as it was."""
    before = snapshot(base)
    with pytest.raises(error, match=message):
        get_peft_model(base, config)
    after = snapshot(base)
    assert after == before


def without_gradient(model: nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.requires_grad and (p.grad is None or not p.grad.any())]


# --- nn.MultiheadAttention multiplies by the weight of its out_proj and never calls the module ---


def tiny_siglip() -> SiglipVisionModel:
    """Its layers have an `out_proj` of their own; its pooling head is an nn.MultiheadAttention with another."""
    config = SiglipVisionConfig(
        hidden_size=24, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, image_size=8, patch_size=4
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return SiglipVisionModel(config).eval()


class Attention(nn.Module):
    """A plain network with an nn.MultiheadAttention and a feed-forward block."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 3, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(12, 20), nn.GELU(), nn.Linear(20, 12))
        self.proj = nn.Linear(12, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.proj(x + self.attention(x, x, x)[0])
        return y + self.mlp(y)


OWN = {f"encoder.layers.{i}.self_attn.{x}_proj" for i in (0, 1) for x in ("q", "k", "v", "out")}


@pytest.mark.parametrize("preset", PRESETS)
def test_all_linear_leaves_out_what_multihead_attention_does_not_call(preset: str) -> None:
    model = get_peft_model(tiny_siglip(), small_config(preset, task_type=None))
    names = {name.removeprefix("vision_model.") for name in tuner_layers(model)}
    assert names >= OWN
    assert not [name for name in names if "head.attention" in name]
    assert "head.mlp" in names or {"head.mlp.fc1", "head.mlp.fc2"} <= names
    shake(model)
    model.train()(pixel_values=torch.randn(5, 3, 8, 8)).pooler_output.pow(2).mean().backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("preset", ["sira", "lora"])
def test_all_linear_in_a_plain_network(preset: str) -> None:
    model = get_peft_model(Attention(), small_config(preset, task_type=None))
    assert set(tuner_layers(model)) == {"mlp.0", "mlp.2", "proj"}


@pytest.mark.parametrize("targets", [["head.attention.out_proj"], ["out_proj"], r".*attention\.out_proj"])
def test_out_proj_of_multihead_attention_is_refused_by_name(targets: Any) -> None:
    config = small_config("sira", task_type=None, target_modules=targets)
    assert_refused(tiny_siglip(), config, r"head\.attention\.out_proj.*MultiheadAttention")


def test_the_others_of_that_name_can_be_named() -> None:
    words: dict[str, Any] = {"target_modules": ["out_proj"], "exclude_modules": r".*head\.attention\..*"}
    model = get_peft_model(tiny_siglip(), small_config("sira", task_type=None, **words))
    names = {name.removeprefix("vision_model.") for name in tuner_layers(model)}
    assert names == {name for name in OWN if name.endswith("out_proj")}


@pytest.mark.parametrize("preset", ["sira", "lora", "mixlora"])
def test_torchs_encoder_layer_uses_the_adapter_in_evaluation_or_is_refused(preset: str) -> None:
    """Its fast path, in evaluation without gradients, reads the weights of its linears and calls none."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = nn.Sequential(nn.TransformerEncoderLayer(12, 2, 20, dropout=0.0, batch_first=True)).eval()
    try:
        model = get_peft_model(base, small_config(preset, task_type=None))
    except TargetError:
        return
    shake(model)
    x = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    expected = model.eval()(x).detach()
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, atol=1e-5, rtol=1e-5)


# --- blocks that are mixtures of experts themselves ---

_BASE = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# For each: config class, model class, fields, names of the blocks that are mixtures, name of a dense one (if there is).
MOE: dict[str, tuple[str, str, dict[str, Any], str, str | None]] = {
    "qwen2_moe": (
        "Qwen2MoeConfig",
        "Qwen2MoeForCausalLM",
        {
            "moe_intermediate_size": 20,
            "shared_expert_intermediate_size": 28,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
        r"layers\.[02]\.mlp",
        "model.layers.1.mlp",
    ),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        "Qwen3MoeForCausalLM",
        {
            "head_dim": 6,
            "moe_intermediate_size": 20,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "mlp_only_layers": [1],
        },
        r"layers\.[02]\.mlp",
        "model.layers.1.mlp",
    ),
    "mixtral": (
        "MixtralConfig",
        "MixtralForCausalLM",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        r"layers\.\d\.mlp",
        None,
    ),
    "olmoe": (
        "OlmoeConfig",
        "OlmoeForCausalLM",
        {"num_experts": 4, "num_experts_per_tok": 2},
        r"layers\.\d\.mlp",
        None,
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        "DeepseekV3ForCausalLM",
        {
            "num_key_value_heads": 6,
            "moe_intermediate_size": 20,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
            "q_lora_rank": 12,
            "kv_lora_rank": 12,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        r"layers\.[12]\.mlp",
        "model.layers.0.mlp",
    ),
    "llama4": (
        "Llama4TextConfig",
        "Llama4ForCausalLM",
        {
            "intermediate_size_mlp": 52,
            "head_dim": 6,
            "num_local_experts": 4,
            "num_experts_per_tok": 1,
            "interleave_moe_layer_step": 2,
        },
        r"layers\.1\.feed_forward",
        "model.layers.0.feed_forward",
    ),
    "gpt_oss": (
        "GptOssConfig",
        "GptOssForCausalLM",
        {"head_dim": 6, "num_local_experts": 4, "num_experts_per_tok": 2},
        r"layers\.\d\.mlp",
        None,
    ),
}
DENSE_TOO = [name for name, entry in MOE.items() if entry[4] is not None]


def moe_model(name: str) -> Any:
    config_class, model_class, fields, _, _ = MOE[name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = getattr(transformers, config_class)(**{**_BASE, **fields})
        return getattr(transformers, model_class)(config).eval()


def linears_in_moe(base: nn.Module, block: str) -> list[str]:
    """Names of the linears in the blocks: routers, gates and shared experts."""
    return [name for name, module in base.named_modules() if isinstance(module, nn.Linear) and re.search(block, name)]


@pytest.mark.parametrize("name", MOE)
def test_a_moe_block_is_refused_for_feed_forward_experts(name: str) -> None:
    """A mixture on its shared expert or on the dense layers alone is not what was asked for."""
    block = MOE[name][3]
    assert_refused(moe_model(name), small_config("mixlora"), rf"mixture-of-experts block .*{block}")


@pytest.mark.parametrize("preset", ["sira", "molora", "lora"])
@pytest.mark.parametrize("name", MOE)
def test_linears_of_a_moe_block_are_refused_for_linear_experts(name: str, preset: str) -> None:
    base = moe_model(name)
    block = MOE[name][3]
    if linears_in_moe(base, block):
        assert_refused(base, small_config(preset), rf"mixture-of-experts block .*{block}")
        return
    # nothing in the block is a linear: refused as well, or the attention alone
    try:
        model = get_peft_model(base, small_config(preset))
    except TargetError:
        return
    assert all(".self_attn." in site for site in tuner_layers(model))


@pytest.mark.parametrize("name", ["qwen2_moe", "deepseek_v3", "llama4"])
def test_a_part_of_a_moe_block_is_refused_by_name(name: str) -> None:
    base = moe_model(name)
    for linear in linears_in_moe(base, MOE[name][3]):
        config = small_config("sira", target_modules=[linear])
        assert_refused(base, config, linear.replace(".", r"\."))


@pytest.mark.parametrize("preset", ["sira", "lora"])
@pytest.mark.parametrize("name", MOE)
def test_attention_beside_a_moe_block_can_be_adapted(name: str, preset: str) -> None:
    targets = r".*self_attn\.[a-z_]*proj(_with_mqa)?"
    model = get_peft_model(moe_model(name), small_config(preset, target_modules=targets))
    assert len(tuner_layers(model)) >= 12
    assert all(".self_attn." in site for site in tuner_layers(model))
    shake(model)
    model.train()(**tiny_batch(batch_size=6, length=30)).loss.backward()
    assert not without_gradient(model)


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
@pytest.mark.parametrize("name", DENSE_TOO)
def test_dense_layers_beside_moe_blocks_are_adapted_once_these_are_excluded(name: str, preset: str) -> None:
    _, _, _, block, dense = MOE[name]
    assert dense is not None
    config = small_config(preset, target_modules="all-linear", exclude_modules=rf".*{block}\..*")
    model = get_peft_model(moe_model(name), config)
    sites = set(tuner_layers(model))
    assert dense in sites if preset == "mixlora" else f"{dense}.down_proj" in sites
    assert not [site for site in sites if re.search(block, site)]
    shake(model)
    model.train()(**tiny_batch(batch_size=6, length=30)).loss.backward()
    assert not without_gradient(model)


# --- "all-linear" together with layers_to_transform ---


def tiny_qwen2_vl() -> Any:
    """Three blocks in the tower, three layers in the language model."""
    text = {**_BASE, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}}
    vision = {"depth": 3, "embed_dim": 24, "hidden_size": 36, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    return transformers.Qwen2VLForConditionalGeneration(
        transformers.Qwen2VLConfig(text_config=text, vision_config=vision)
    )


STACKED: dict[str, Callable[[], Any]] = {
    **{name: partial(tiny_model, name) for name in ("llama", "gpt2", "phi3", "bert", "t5")},
    "llava": tiny_llava,
    "qwen2_vl": tiny_qwen2_vl,
    "siglip": tiny_siglip,
}


@pytest.mark.parametrize("preset", ["mixlora", "sira"])
@pytest.mark.parametrize("name", STACKED)
def test_all_linear_in_one_layer(name: str, preset: str) -> None:
    """Only that layer, of one stack; or refused with the reason, as PEFT refuses the two words together."""
    words: dict[str, Any] = {
        "target_modules": "all-linear",
        "layers_to_transform": [1],
        "task_type": None if name == "siglip" else task_type(name),
    }
    base = STACKED[name]()
    before = snapshot(base)
    try:
        model = get_peft_model(base, small_config(preset, **words))
    except (ConfigError, TargetError) as error:
        assert "layers_to_transform" in str(error)  # noqa: PT017
        assert "all-linear" in str(error)  # noqa: PT017
        assert snapshot(base) == before
        return
    sites = list(tuner_layers(model))
    assert sites
    assert not [site for site in sites if ".1." not in site]
    assert len({site.split(".1.")[0] for site in sites}) == 1


def test_named_linears_in_one_layer_stay_possible() -> None:
    words: dict[str, Any] = {"target_modules": ["q_proj", "gate_proj", "up_proj", "down_proj"], "task_type": None}
    model = get_peft_model(tiny_qwen2_vl(), small_config("mixlora", layers_to_transform=[1], **words))
    assert {site.removeprefix("model.") for site in tuner_layers(model)} == {
        "language_model.layers.1.self_attn.q_proj",
        "language_model.layers.1.mlp",
    }
