"""Tiny base models with mixture-of-experts blocks of their own, or of several towers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as tf
from torch import nn

from tests.conftest import VOCAB

DECODER = {
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
FOUR = {"num_local_experts": 4, "num_experts_per_tok": 2}
FOUR_OF_20 = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
VISION = {"hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 3, "num_attention_heads": 4}


def _deepseek() -> Any:
    sizes = {"q_lora_rank": 12, "kv_lora_rank": 12, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    experts = {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "n_shared_experts": 1}
    words = {**DECODER, "num_key_value_heads": 6, "moe_intermediate_size": 20, "first_k_dense_replace": 1}
    return tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**words, **experts, **sizes))


def _qwen3_next() -> Any:
    linear = {"linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8}
    layers = ["linear_attention", "full_attention", "linear_attention"]
    words = {**DECODER, **FOUR_OF_20, **linear, "shared_expert_intermediate_size": 28, "linear_value_head_dim": 8}
    return tf.Qwen3NextForCausalLM(tf.Qwen3NextConfig(**words, head_dim=8, layer_types=layers))


def _gemma4() -> Any:
    # router and experts are direct parts of the decoder layer, beside the attention and a dense block
    words = {**DECODER, "head_dim": 6, "global_head_dim": 6, "hidden_size_per_layer_input": 8}
    experts = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 20}
    layers = ["sliding_attention", "sliding_attention", "full_attention"]
    extra = {"vocab_size_per_layer_input": VOCAB, "num_kv_shared_layers": 0, "layer_types": layers}
    return tf.Gemma4ForCausalLM(tf.Gemma4TextConfig(**words, **experts, **extra))


def _switch() -> Any:
    words = {"vocab_size": VOCAB, "d_model": 36, "d_ff": 52, "d_kv": 6, "num_heads": 6, "num_experts": 4}
    words |= {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    layers = {"num_layers": 2, "num_decoder_layers": 2, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1}
    return tf.SwitchTransformersForConditionalGeneration(tf.SwitchTransformersConfig(**words, **layers))


def _dbrx() -> Any:
    # experts flattened to two dimensions
    config = tf.DbrxConfig(
        vocab_size=VOCAB,
        d_model=36,
        n_heads=6,
        n_layers=2,
        max_seq_len=64,
        attn_config={"kv_n_heads": 3, "clip_qkv": 8, "rope_theta": 1e4},
        ffn_config={"ffn_hidden_size": 20, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 36},
    )
    return tf.DbrxForCausalLM(config)


def _granite_shared() -> Any:
    return tf.GraniteMoeSharedForCausalLM(tf.GraniteMoeSharedConfig(**DECODER, **FOUR, shared_intermediate_size=28))


MOE: dict[str, Callable[[], Any]] = {
    "mixtral": lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, **FOUR)),
    "qwen2_moe": lambda: tf.Qwen2MoeForCausalLM(
        tf.Qwen2MoeConfig(**DECODER, **FOUR_OF_20, shared_expert_intermediate_size=28)
    ),
    "qwen3_moe": lambda: tf.Qwen3MoeForCausalLM(
        tf.Qwen3MoeConfig(**DECODER, **FOUR_OF_20, head_dim=6, mlp_only_layers=[0])
    ),
    "olmoe": lambda: tf.OlmoeForCausalLM(tf.OlmoeConfig(**DECODER, num_experts=4, num_experts_per_tok=2)),
    "deepseek_v3": _deepseek,
    "gpt_oss": lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER, **FOUR, head_dim=6)),
    "llama4": lambda: tf.Llama4ForCausalLM(
        tf.Llama4TextConfig(
            **{**DECODER, **FOUR, "num_experts_per_tok": 1, "head_dim": 6},
            intermediate_size_mlp=52,
            interleave_moe_layer_step=2,
        )
    ),
    "qwen3_next": _qwen3_next,
    "gemma4": _gemma4,
    "granitemoeshared": _granite_shared,
    "jetmoe": lambda: tf.JetMoeForCausalLM(
        tf.JetMoeConfig(**{**DECODER, "num_key_value_heads": 3, "kv_channels": 6}, **FOUR)
    ),
    "dbrx": _dbrx,
    "switch": _switch,
}


def llava() -> Any:
    """A vision tower and a language model of three layers each; both have linears named q_proj."""
    vision = tf.CLIPVisionConfig(**VISION, image_size=8, patch_size=4)
    config = tf.LlavaConfig(vision_config=vision, text_config=tf.LlamaConfig(**DECODER), image_token_index=96)
    return tf.LlavaForConditionalGeneration(config)


def qwen2_vl() -> Any:
    """A vision tower whose linears have other names than the language model's."""
    rope = {"rope_type": "default", "mrope_section": [1, 1, 1], "rope_theta": 1e4}
    vision = {"depth": 3, "embed_dim": 24, "hidden_size": 36, "num_heads": 4, "mlp_ratio": 2, "patch_size": 4}
    config = tf.Qwen2VLConfig(text_config={**DECODER, "rope_parameters": rope}, vision_config=vision)
    return tf.Qwen2VLForConditionalGeneration(config)


def seeded(make: Callable[[], nn.Module]) -> Any:
    """The model with fixed weights, in eval mode."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return make().eval()
