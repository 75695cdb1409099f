"""A control: plain LoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import lora_experts


@preset(paper="2106.09685", verified="PEFT")
def lora(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    **peft_words: Any,
) -> MoeLoraConfig:
    """A control: ordinary LoRA (arXiv 2106.09685) through moelora's own layers, one expert and no router.

    Equal to `peft.LoraConfig` of the same rank on the same targets.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=1),
        placement={"kind": "linear", "unrouted_modules": ".*"},
        selection={"kind": "top_k", "k": 1},
        **peft_words,
    )
