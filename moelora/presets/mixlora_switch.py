"""MixLoRA with the routing of Switch Transformers."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2404.15159", verified="golden values")
def mixlora_switch(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    capacity: int | None = 32,
    capacity_in_eval: bool = False,
    balance_coef: float = 1e-3,
    z_loss_coef: float = 1e-3,
    router_init_std: float = 1.0,
    router_jitter: float = 0.01,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixLoRA-Switch, "mixlora-switch" of MixLoRA's code (arXiv 2404.15159): as `mixlora`, with Switch's router.

        p = softmax(W_r (h * U(1 - eps, 1 + eps))),   e = argmax p,   y = p_e E_e(h)

    The jitter eps is the router's alone and in training only. An expert takes at most `capacity` tokens of a sequence,
    in training only (`capacity_in_eval`). Losses: Switch's balance and the router z-loss, 1e-3 each as in the code; a
    good capacity is length / num_experts times 1 to 2. B = 0 is **not** the base model: its block is scaled by p_e.

    Deviations: for a token past the capacity the block gives 0, so that it passes by the residual connection, as in
    the Switch paper (arXiv 2101.03961); the code gives p_e h there, which adds the normalised input to the residual
    stream. The code's forward in inference returns its input unprocessed, a fault; here it is as in training without
    the capacity. `ffn_dropout` (0 by default) is not offered.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward",
        scores={"kind": "linear", "init_std": router_init_std, "jitter": router_jitter},
        selection={
            "kind": "top_k",
            "k": 1,
            "renormalize": num_experts == 1,
            "capacity": capacity,
            "capacity_in_eval": capacity_in_eval,
        },
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
