"""THOR on MixLoRA's sites: experts without a router, drawn at random."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import lora_experts


@preset(paper="2110.04260", verified="official code's formula")
def thor(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 2,
    consistency_coef: float = 2.5,
    **peft_words: Any,
) -> MoeLoraConfig:
    """THOR (arXiv 2110.04260): no router; each feed-forward block draws one expert at random in each training forward.

        loss = the trainer's + coef * mean_n (KL(p_n || q_n) + KL(q_n || p_n)) / 2

    p and q are the predictions of two forwards with draws of their own, at each position n that has a label, so that
    the experts learn to agree. A control like `random_router`, with the sites and experts of MixLoRA: what a router
    gains over this, it gains by choosing. 2 experts as in the code.

    In evaluation a block gives the mean of its experts' outputs. The paper and its code draw one for each sentence or
    token there too; then an output would change from call to call and with the KV cache, and the experts have been
    trained to agree.

    Deviations: the paper's loss is that of both forwards and alpha times the divergence, alpha 5 in the code's script;
    halved, that is coefficient 2.5 beside a trainer's loss of one forward. Here that forward is a third one, with its
    own draw: the expected gradient is half the paper's, and a step costs three forwards. The code has experts in every
    other layer, whole feed-forward blocks; here LoRAs in each, and plain LoRAs on attention. Processes and
    micro-batches draw for themselves.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward",
        scores="constant",
        selection="draw",
        balance=[{"kind": "consistency", "coef": consistency_coef}] if consistency_coef != 0 else [],
        **peft_words,
    )
