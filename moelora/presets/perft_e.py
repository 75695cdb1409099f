"""PERFT-E."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import block_experts


@preset(paper="2411.08212", verified="official code's formula")
def perft_e(
    *,
    num_experts: int = 8,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    **peft_words: Any,
) -> MoeLoraConfig:
    """PERFT-E (arXiv 2411.08212): a LoRA for each expert of the base's own mixture, weighted as the base weighs them.

        y = sum_i G_i(x) (E_i(x) + (alpha / r) B_i A_i x)

    with G the frozen router of the base, and E_i its experts. `num_experts` has to be the number of the
    base, 8 in Mixtral. Defaults are those of the code: r 16, alpha 32, dropout 0.05.

    Deviations: B starts at 0 (the code's at 1e-6 randn). Dropout draws are shared by the experts. The auxiliary loss on
    the base's own router is left to the base model: its router is frozen. The parallel bottleneck adapter that the
    paper offers as another expert is not here.
    """
    return MoeLoraConfig(
        experts=block_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts),
        placement="moe_block",
        scores="base_router",
        selection="dense",
        **peft_words,
    )
