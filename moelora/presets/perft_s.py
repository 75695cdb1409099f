"""PERFT-S."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import block_experts


@preset(paper="2411.08212", verified="paper's equations")
def perft_s(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    **peft_words: Any,
) -> MoeLoraConfig:
    """PERFT-S (arXiv 2411.08212): one LoRA across each mixture-of-experts block of the base, always on.

        y = block(x) + (alpha / r) B A x

    PERFT-D with one LoRA. Defaults are those of the code: r 16, alpha 32, dropout 0.05.

    Deviations: B starts at 0 (the code's at 1e-6 randn). Dropout draws are shared by the experts. The auxiliary loss on
    the base's own router is left to the base model: its router is frozen. The parallel bottleneck adapter that the
    paper offers as another expert is not here.
    """
    return MoeLoraConfig(
        experts=block_experts(r, lora_alpha, lora_dropout, use_rslora, 1),
        placement="moe_block",
        scores={"kind": "constant", "weights": [1.0]},
        selection="dense",
        **peft_words,
    )
