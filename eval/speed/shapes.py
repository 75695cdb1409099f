"""Single decoder blocks of the sizes of real models, without values, and adapters on them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

# First: it drops what bitsandbytes prints when PEFT imports it.
from moelora import MoeLoraConfig

# isort: split
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AttentionInterface, AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen3Config

from moelora.layers.base import MoeLoraLayer
from moelora.routing.run import batch_facts

SHAPES: dict[str, tuple[type[PretrainedConfig], dict[str, int]]] = {
    "SmolLM2-135M": (
        LlamaConfig,
        {"hidden_size": 576, "intermediate_size": 1536, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "Qwen3-4B": (
        Qwen3Config,
        {
            "hidden_size": 2560,
            "intermediate_size": 9728,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "Llama-3-8B": (
        LlamaConfig,
        {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8},
    ),
}
"""Configuration class and sizes of a decoder block by model."""

BLOCK, FEED_FORWARD = "decoder block", "feed-forward block"
_WORDS: dict[str, dict[str, Any]] = {
    "moelora_task": {"num_tasks": 4},
    "poly": {"num_tasks": 4},
    "mhr": {"num_tasks": 4},
    "mola": {"num_experts": 8},
    "mos": {"r": 2},
}
"""What presets cannot do without, on one block: the pools of `mos` are those of a whole model."""


def _flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """Causal attention by the kernel that a GPU would take: one launch each way."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.is_meta:
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, is_causal=True)[0]
    else:
        output = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True)
    return output.transpose(1, 2), None


AttentionInterface.register("counted_attention", _flash)


def base(shape: str, device: str = "meta", layers: int = 1) -> Any:
    """A frozen model of one decoder block, or of several, in bf16."""
    kind, sizes = SHAPES[shape]
    config = kind(**sizes, num_hidden_layers=layers, vocab_size=8, tie_word_embeddings=True)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="counted_attention")
    return model.requires_grad_(False)


@dataclass(frozen=True)
class Adapted:
    """A base with an adapter.

    Attributes:
        model: The PEFT model, in training mode.
    """

    model: Any

    @property
    def reads_batch(self) -> bool:
        """Whether routing needs a fact of the batch."""
        return any(layer.needs() for layer in self.model.modules() if isinstance(layer, MoeLoraLayer))

    def forward(self, part: str, batch: int, length: int) -> Callable[[], Tensor]:
        """The forward pass of a part, from hidden states that need a gradient, as those of any later layer do.

        Args:
            part: `BLOCK` or `FEED_FORWARD`.
            batch: Sequences.
            length: Tokens of each.
        """
        inner = self.model.get_base_model().model
        weight = next(inner.layers.parameters())
        size = (batch, length, inner.config.hidden_size)
        hidden = torch.empty(size, dtype=weight.dtype, device=weight.device, requires_grad=True)
        if part == FEED_FORWARD:
            return lambda: inner.layers[0].mlp(hidden)

        def run() -> Tensor:
            facts = {"task_ids": torch.zeros(batch, dtype=torch.long, device=weight.device)} if self.reads_batch else {}
            with batch_facts(**facts):
                found: Tensor = inner(inputs_embeds=hidden, use_cache=False).last_hidden_state
            return found

        return run


def mixture(model: Any, preset: str, **words: Any) -> Adapted:
    """A preset on a base."""
    config = MoeLoraConfig.from_preset(preset, task_type="CAUSAL_LM", **_WORDS.get(preset, {}) | words)
    if not getattr(config.scores, "fitted", True):
        config.scores = replace(config.scores, fitted=True)  # centroids cost the same whatever their values are
    adapted = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    return Adapted(_like(model, adapted))


def _like(model: Any, adapted: Any) -> Any:
    weight = next(model.parameters())
    return adapted.to(device=weight.device, dtype=weight.dtype).train()


def lora(model: Any, ranks: dict[str, int], dropout: float) -> Adapted:
    """PEFT's LoRA on linears of a base.

    Args:
        model: The base.
        ranks: Rank by the linear's name.
        dropout: Its dropout.
    """
    config = LoraConfig(
        task_type="CAUSAL_LM",
        target_modules=list(ranks),
        rank_pattern={f"^{name}$": rank for name, rank in ranks.items()},
        lora_dropout=dropout,
    )
    return Adapted(_like(model, get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)))


def dropout_of(adapted: Adapted) -> float:
    """The LoRA dropout of an adapter."""
    return float(adapted.model.peft_config["default"].experts.lora_dropout)


DEFAULT_RANK = 16


def ranks_of(adapted: Adapted) -> dict[str, int]:
    """The linears that an adapter changes, with the rank of the LoRA it is compared with.

    It is one expert's rank where experts are whole blocks, since each token takes the block as a whole; on a single
    linear the rank of all experts together, which is a LoRA of the same size; 16 for experts that are no LoRAs.
    """
    names = {id(module): name for name, module in adapted.model.get_base_model().named_modules()}
    found: dict[str, int] = {}
    for module in adapted.model.modules():
        if not isinstance(module, MoeLoraLayer):
            continue
        for role in module.linear_sizes():
            linear = module.linear(role) if role else module.get_base_layer()  # type: ignore[operator]
            if not isinstance(linear, nn.Linear):
                continue
            name = names[id(linear)].replace(".base_layer", "")
            rank = DEFAULT_RANK
            if module.is_low_rank("default"):
                factors = module.lora_factors(role, "default")
                if factors is None:
                    continue
                experts, _, rank = factors.b_EOR.shape
                rank = rank if role else rank * experts
            found[name] = rank
    return found
