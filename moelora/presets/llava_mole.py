"""LLaVA-MoLE."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2401.16160", verified="abstract only")
def llava_mole(
    *,
    r: int = 32,
    lora_alpha: float = 64,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 3,
    top_k: int = 1,
    multiply_by_gate: bool = False,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """LLaVA-MoLE (arXiv 2401.16160): each token to one LoRA expert of a feed-forward block, by the block's input.

        k = argmax softmax(W_g h),   y = W x + (alpha / r) B_k A_k x   at each linear of the block with the input h

    One router serves the linears of a block, whose experts are LoRAs of their own; the other linears get plain LoRA.
    With `multiply_by_gate` the expert is weighted by its probability. Without it (the default) the task gives the
    router **no gradient**: it learns from the balance loss alone, without which the combination is refused. The same
    experts chosen as whole blocks with weight 1 are `mixlora`'s, so that without the gate the two differ in nothing
    but the number of experts of a token and the router's gradient.

    After the abstract, which says: sparse LoRA experts in the feed-forward layers, top-1 by token, on LLaVA-1.5.
    **Unverified choices**: 3 experts of rank 32, dropout 0.05, no gate, and the coefficient 1e-2 are those of a
    third-party reimplementation, as is one router for the block; alpha, the start of W_g (kaiming uniform), plain LoRA
    on the other linears and the normalisation of the loss (Switch's, 1 at balance; there it is counts times summed
    probabilities) are ours.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward_linears",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_k", "k": top_k, "renormalize": False, "multiply_by_gate": multiply_by_gate},
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
