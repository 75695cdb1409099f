"""MoLoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2309.05444", verified="official code's formula")
def molora(
    *,
    r: int = 4,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    num_experts: int = 10,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    router_init_std: float = 0.02,
    routers: str = "per_site",
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoLoRA (arXiv 2309.05444): dense soft routing over LoRA experts on every linear.

        p = softmax(W_r x),   y = W0 x + (alpha / r) sum_e p_e B_e A_e x

    A and W_r start at N(0, 0.02), B at 0, as in the authors' T5X code; no auxiliary loss. The paper targets q, k, v, o,
    wi and wo of T5, which is every linear but the head. `routers="per_input"`, one router for linears of one input, is
    an option of ours for speed.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts, init="normal"),
        placement={"kind": "linear", "routers": routers},
        scores={"kind": "linear", "init_std": router_init_std},
        selection="dense",
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
