"""PERFT-D."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import block_experts


@preset(paper="2411.08212", verified="paper's equations")
def perft_d(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 2,
    **peft_words: Any,
) -> MoeLoraConfig:
    """PERFT-D (arXiv 2411.08212): LoRAs across each mixture-of-experts block of the base that are always on.

        y = block(x) + sum_j (alpha / r) B_j A_j x

    Defaults: r 16, alpha 32, dropout 0.05, as in the code, and 2 LoRAs.

    Deviations: B starts at 0 (the code's at 1e-6 randn). Dropout draws are shared by the experts. The auxiliary loss on
    the base's own router is left to the base model: its router is frozen. The parallel bottleneck adapter that the
    paper offers as another expert is not here. (What the code's README calls
    "PERFT-D" is R.)
    """
    return MoeLoraConfig(
        experts=block_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts),
        placement="moe_block",
        scores={"kind": "constant", "weights": [1.0] * num_experts},
        selection="dense",
        **peft_words,
    )
