"""A control: MixLoRA with a router that does not learn."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import lora_experts


@preset(paper=None, verified="a control")
def random_router(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """A control: MixLoRA's sites and experts with a frozen random top-k router and no balance loss.

    What a method gains over this, it gains by learning where to route.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward",
        scores={"kind": "linear", "init_std": router_init_std, "trainable": False},
        selection={"kind": "top_k", "k": top_k},
        **peft_words,
    )
