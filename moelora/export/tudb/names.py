"""The folders of MixLoRA's authors (TUDB-Labs' MixLoRA and MoE-PEFT, PyPI mixlora).

adapter_config.json, and adapter_model.bin with

    mixlora.layers.{i}.mlp.moe_gate.weight                                    [E, D]
    mixlora.layers.{i}.mlp.{linear}.experts.{e}.lora_A.weight, lora_B.weight  [R, in], [out, R]
    mixlora.layers.{i}.self_attn.{linear}.lora_A.weight, lora_B.weight        the same, not routed

Their code walks every layer and takes every linear of a target's name, in a closed list of architectures.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from moelora.errors import ExportError

PICKLE_FILE = "adapter_model.bin"
MODEL_TYPES = ("llama", "gemma", "gemma2", "qwen2", "mistral", "phi", "phi3")
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj", "dense", "qkv_proj")
ROLES = {
    "gate_proj": "gate",
    "up_proj": "up",
    "down_proj": "down",
    "fc1": "up",
    "fc2": "down",
    "gate_up_proj": "up",
}
"""The role that moelora gives to each linear of a feed-forward block."""

LEAST_DROPOUT = 1e-9
"""Their code refuses 0. This is 0 in effect, and read as 0."""


def activation_of(base: nn.Module) -> str:
    """What their configuration calls act_fn, of a base model.

    Raises:
        ExportError: If it is not of a type that their code knows.
    """
    config: Any = getattr(base, "config", None)
    model_type = getattr(config, "model_type", type(base).__name__)
    if model_type not in MODEL_TYPES:
        raise ExportError(
            f"the base model is of type {model_type!r}; allowed, as in MixLoRA's code: {', '.join(MODEL_TYPES)}."
        )
    return str(config.hidden_activation if config.model_type == "gemma2" else config.hidden_act)
