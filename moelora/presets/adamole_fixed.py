"""The baseline of AdaMoLE with a fixed threshold."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2405.00361", verified="golden values")
def adamole_fixed(
    *,
    r: int = 4,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    threshold: float | None = None,
    balance_coef: float = 1e-3,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """The baseline "MoLE, threshold 1/N" of AdaMoLE's paper (arXiv 2405.00361): the experts above a fixed probability.

        p = softmax(W_g x),   m = 1[p >= t],   y = W0 x + (alpha / r) sum_e (p_e m_e / sum(p m)) B_e A_e x

    t is 1 / num_experts, so that at least one expert always passes. The balance loss is Switch's on the experts that
    pass. Otherwise as `adamole`, its deviations too.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "threshold", "threshold": threshold},
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
