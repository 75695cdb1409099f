"""The map: which native MoE architecture says the same as a dense one with a mixture in its feed-forward blocks.

One function per dense architecture: it gives the target and the words of its configuration, or says why there is none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from moelora.errors import ExportError

_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "attention_dropout",
    "rope_parameters",
)
SHARED_EXPERT_SIZE = 256
"""Width of Qwen2-MoE's shared expert, which is 0: small, and a multiple of what quantised and split kernels ask for."""


@dataclass(frozen=True)
class Target:
    """A native MoE architecture, with the names of its tensors on disk.

    Attributes:
        architecture: Name of the class in transformers.
        config_class: Name of its configuration's class.
        num_experts: The configuration's word for E.
        router: The router's name within a layer.
        experts: Names of the linears of an expert within a layer, by role, with `{e}` for its number; of stacked
            experts "gate_up" and "down" [E, out, in].
        is_stacked: Whether the experts of a layer are stacked in one tensor.
        norm_topk_prob: Whether its configuration says if the weights of the chosen experts are renormalised; else they
            always are.
        has_dense_layers: Whether single layers can be left without a mixture.
        has_shared_expert: Whether each block has an expert beside the routed ones.
    """

    architecture: str
    config_class: str
    num_experts: str
    router: str
    experts: dict[str, str]
    is_stacked: bool = False
    norm_topk_prob: bool = False
    has_dense_layers: bool = False
    has_shared_expert: bool = False


_QWEN_EXPERTS = {role: f"mlp.experts.{{e}}.{role}_proj.weight" for role in ("gate", "up", "down")}

MIXTRAL = Target(
    "MixtralForCausalLM",
    "MixtralConfig",
    "num_local_experts",
    "block_sparse_moe.gate.weight",
    {
        role: f"block_sparse_moe.experts.{{e}}.{name}.weight"
        for role, name in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    },
)
GRANITE_MOE = Target(
    "GraniteMoeForCausalLM",
    "GraniteMoeConfig",
    "num_local_experts",
    "block_sparse_moe.router.layer.weight",
    {"gate_up": "block_sparse_moe.input_linear.weight", "down": "block_sparse_moe.output_linear.weight"},
    is_stacked=True,
)
QWEN2_MOE = Target(
    "Qwen2MoeForCausalLM",
    "Qwen2MoeConfig",
    "num_experts",
    "mlp.gate.weight",
    _QWEN_EXPERTS,
    norm_topk_prob=True,
    has_dense_layers=True,
    has_shared_expert=True,
)
QWEN3_MOE = Target(
    "Qwen3MoeForCausalLM",
    "Qwen3MoeConfig",
    "num_experts",
    "mlp.gate.weight",
    _QWEN_EXPERTS,
    norm_topk_prob=True,
    has_dense_layers=True,
)
FLEX_OLMO = Target(
    "FlexOlmoForCausalLM", "FlexOlmoConfig", "num_experts", "mlp.gate.weight", _QWEN_EXPERTS, norm_topk_prob=True
)

TARGETS = (MIXTRAL, GRANITE_MOE, QWEN2_MOE, QWEN3_MOE, FLEX_OLMO)

Words = dict[str, Any]


def _llama(config: Any) -> tuple[Target, Words]:
    if not config.attention_bias:
        return MIXTRAL, {}
    # of the targets with biases on all four attention linears it is the one without further norms
    return GRANITE_MOE, {
        "attention_bias": True,
        "attention_multiplier": head_dim(config) ** -0.5,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    }


def _mistral(config: Any) -> tuple[Target, Words]:
    if len(set(getattr(config, "layer_types", None) or ())) > 1:
        raise ExportError(_refusal(config, _ALTERNATES))
    return MIXTRAL, {"sliding_window": config.sliding_window}


def _qwen2(config: Any) -> tuple[Target, Words]:
    return QWEN2_MOE, {
        "moe_intermediate_size": config.intermediate_size,
        "shared_expert_intermediate_size": min(SHARED_EXPERT_SIZE, config.intermediate_size),
        "decoder_sparse_step": 1,
        "qkv_bias": True,
        "use_sliding_window": config.use_sliding_window,
        "sliding_window": config.sliding_window,
        "max_window_layers": config.max_window_layers,
        "layer_types": list(config.layer_types),
    }


def _qwen3(config: Any) -> tuple[Target, Words]:
    slides = config.sliding_window is not None
    if slides and len(set(config.layer_types)) > 1:
        raise ExportError(_refusal(config, f"{_ALTERNATES} (max_window_layers is {config.max_window_layers})"))
    slides = slides and config.layer_types[0] == "sliding_attention"
    return QWEN3_MOE, {
        "moe_intermediate_size": config.intermediate_size,
        "decoder_sparse_step": 1,
        "attention_bias": config.attention_bias,
        "use_sliding_window": slides,
        "sliding_window": config.sliding_window if slides else None,
        "max_window_layers": config.max_window_layers,  # transformers ignores it, mistral.rs asks for it
    }


def _granite(config: Any) -> tuple[Target, Words]:
    words = ("attention_bias", "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling")
    return GRANITE_MOE, {word: getattr(config, word) for word in words}


def _olmo2(config: Any) -> tuple[Target, Words]:
    return FLEX_OLMO, {"attention_bias": config.attention_bias}


def _phi3(config: Any) -> tuple[Target, Words]:
    return MIXTRAL, {"sliding_window": config.sliding_window}


ROWS: dict[str, Callable[[Any], tuple[Target, Words]]] = {
    "llama": _llama,
    "mistral": _mistral,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "granite": _granite,
    "olmo2": _olmo2,
    "phi3": _phi3,
}
"""By the `model_type` of the dense model. SmolLM2 is a Llama."""

_ALTERNATES = "layers with a sliding window alternate with layers without one, and the MoE architecture has one window"
_GEMMA = "its blocks have norms behind them and its embeddings a factor, which no MoE architecture in the map has"
REASONS = {
    "gemma": "its embeddings have a factor and its norms an offset, which no MoE architecture in the map has",
    "gemma2": _GEMMA,
    "gemma3": _GEMMA,
    "gemma3_text": _GEMMA,
    "smollm3": "some of its layers have no positional encoding (NoPE), which no MoE architecture in the map can say",
    "ministral": _ALTERNATES,
    "ministral3": "it scales its queries by their position, which no MoE architecture in the map does",
    **dict.fromkeys(
        ("gpt2", "gptj", "gpt_neox", "opt", "bloom", "falcon", "phi", "starcoder2", "nemotron", "bert", "t5"),
        "its feed-forward blocks have two linears, and the experts of a native MoE three",
    ),
}
"""Why there is no row for architectures that one might expect, by `model_type`."""


def find_target(config: Any) -> tuple[Target, Words]:
    """The target of a dense model, and its configuration but for what the mixtures say.

    Args:
        config: The dense model's configuration.

    Raises:
        ExportError: With the reason why there is none.
    """
    row = ROWS.get(config.model_type)
    if row is None:
        reason = REASONS.get(config.model_type, "no native MoE architecture is known to compute the same")
        raise ExportError(_refusal(config, reason))
    if getattr(config, "mlp_bias", False):
        raise ExportError(_refusal(config, "its feed-forward blocks have biases (mlp_bias), which native experts lack"))
    rope = config.rope_parameters or {}
    share = rope.get("partial_rotary_factor", 1.0)
    if share != 1.0:
        raise ExportError(
            _refusal(
                config,
                f"it rotates a part of each head only (partial_rotary_factor is {share}), and the MoE architecture all",
            )
        )
    target, own = row(config)
    words = {name: getattr(config, name) for name in _SHARED}
    words["rope_parameters"] = {name: value for name, value in rope.items() if name != "partial_rotary_factor"}
    words["head_dim"] = head_dim(config)
    return target, {**words, **own}


def head_dim(config: Any) -> int:
    """Features of one attention head."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _refusal(config: Any, reason: str) -> str:
    return (
        f"a {config.model_type!r} with mixtures is no native MoE: {reason}. Allowed: {', '.join(ROWS)} (SmolLM2 is a "
        "llama). The adapter itself keeps working with PEFT."
    )
