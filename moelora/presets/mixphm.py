"""MixPHM."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2303.01239", verified="official code's formula")
def mixphm(
    *,
    num_experts: int = 4,
    reduction: int = 12,
    summands: int = 4,
    rank: int = 8,
    scale: float = 1.0,
    lora_dropout: float = 0.0,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixPHM (arXiv 2303.01239): hypercomplex adapters behind each feed-forward block, one of them drawn in training.

        y' = y + scale * Up_e(gelu(Down(y))),   y the block's output

    with one Down for all experts, and matrices of both that are `sum_i P_i (x) (U_i V_i)` of N = 4 summands of rank 8.
    In training each block draws one expert per forward; in evaluation it takes the mean of their matrices (a "soup"),
    so that there is no router. Defaults are those of the code: 4 experts, reduction 12.

    Deviations: the two regularisers of the paper (redundancy, mutual information) look at activations, not at routing,
    and are left out. What could not be read is ours: P, U and V are each linear's and expert's own, the activation is
    gelu, scale is 1, what is added (as a bias) starts at 0 as V of Up does, so that the adapter starts at the base. The
    mean is of the matrices, not of their factors. The paper's base is VL-T5; here any model with feed-forward blocks.
    """
    return MoeLoraConfig(
        experts={
            "kind": "phm",
            "num_experts": num_experts,
            "reduction": reduction,
            "summands": summands,
            "rank": rank,
            "scale": scale,
            "lora_dropout": lora_dropout,
        },
        placement={"kind": "parts", "parts": ["down"]},
        scores="constant",
        selection="draw",
        **peft_words,
    )
