"""MixLoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2404.15159", verified="golden values")
def mixlora(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    renormalize: bool | None = None,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MixLoRA (arXiv 2404.15159): whole feed-forward experts, routed per block, and plain LoRA on the other linears.

    `p = softmax(W_r h)`, the top-k weights renormalised to sum 1 (Eq. 7 and the authors' code), and

        E_e(h) = W2 a_e + s B2_e A2_e a_e,  a_e = act(W1 h + s B1_e A1_e h) * (W3 h + s B3_e A3_e h)
        y      = sum_k w_k E_{e_k}(h)

    with frozen W1, W2, W3 shared by all experts. Plain two-linear blocks and fused gate_up blocks have the same form
    (the fused linear has one LoRA, as in the authors' code). Defaults are those of the paper's Table 3.

    With `top_k=1` a renormalised weight would be 1 whatever the router says, so the weight is the raw probability, as
    in Switch (`renormalize` is `top_k > 1` unless it is given). B = 0 is then not the base: the block's output is
    scaled by that probability.

    Deviations: `balance_coef` is the paper's 1e-2 (Eq. 8-10); there `f` counts the argmax, here all k choices divided
    by k, which is 1.0 at balance as well. The authors' code uses 1e-3 on the pooled form that is k at balance:
    `balance_loss="mixtral", balance_coef=1e-3`. Dropout draws are shared by the experts. The code's router jitter (0 by
    default) is not offered. With the default `target_modules` every linear outside the feed-forward blocks but the head
    gets a plain LoRA; in a decoder those are the attention linears.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement="feed_forward",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={
            "kind": "top_k",
            "k": top_k,
            "renormalize": top_k != 1 or num_experts == 1 if renormalize is None else renormalize,
        },
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
