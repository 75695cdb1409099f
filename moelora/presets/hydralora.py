"""HydraLoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2404.19245", verified="official code's formula")
def hydralora(
    *,
    r: int = 4,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 4,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """HydraLoRA (arXiv 2404.19245): one A that all experts share and a B each, dense soft routing, on every linear.

        p = softmax(W_r x),   y = W0 x + (alpha / r) sum_e p_e B_e (A x)

    A and W_r start kaiming-uniform, B at 0; no auxiliary loss. Defaults are those of the authors' script: rank 4, alpha
    32, 4 heads, dropout 0.05.

    Deviations: the script adapts the feed-forward linears (gate, up, down); here the default is every linear but the
    head, as with the other presets.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts, kind="lora_shared_a"),
        scores={"kind": "linear", "init_std": router_init_std},
        selection="dense",
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
