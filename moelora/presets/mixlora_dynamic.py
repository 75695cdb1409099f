"""MixLoRA with top-p routing."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2404.15159", verified="golden values")
def mixlora_dynamic(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_p: float = 0.8,
    renormalize: bool = False,
    balance_coef: float = 1e-3,
    z_loss_coef: float = 0.0,
    balance_loss: str = "mixtral",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixLoRA-Dynamic, "mixlora-dynamic" of MixLoRA's code (arXiv 2404.15159): as `mixlora`, with top-p for top-k.

        p = softmax(W_r h),   y = sum_{e in S} p_e E_e(h),   S = the best experts until sum_{e in S} p_e > top_p

    The weights are the raw probabilities, as in the code: their sum is at most 1 and scales the whole block, the frozen
    part too, so that B = 0 is **not** the base model (`renormalize=True` makes it so). The balance loss is the code's
    pooled form on the experts that are kept, whose value at balance is their mean number.

    Deviations: the code's `temperature` divides probabilities without another softmax and is not offered. The loss
    counts valid tokens only. Otherwise as `mixlora`.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_p", "p": top_p, "renormalize": renormalize},
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
