"""AdaMoLE."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2405.00361", verified="golden values")
def adamole(
    *,
    r: int = 4,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    max_threshold: float | None = None,
    balance_coef: float = 1e-3,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """AdaMoLE (arXiv 2405.00361): LoRA experts on every linear, as many of them as pass a threshold learned per token.

        p = softmax(W_g x),   tau = tau_max sigmoid(w_tau x + b_tau),   a = p - tau,   m = 1[a >= 0]
        y = W0 x + (alpha / r) sum_e (a_e m_e / sum(a m)) B_e A_e x

    tau_max is 1 / num_experts, so that at least one expert always passes. The balance loss is the code's,
    `E sum_e (mean_t m_te) (mean_t a_te)`. Defaults are the paper's: 8 experts of rank 4, alpha 16, dropout 0.05, 1e-3.

    Deviations: the paper adapts the attention linears; here the default is every linear but the head, as with the other
    presets (`target_modules=["q_proj", "k_proj", "v_proj", "o_proj"]` for the paper's). The loss is the mean over the
    layers and counts valid tokens only; the code sums over the adapted modules and counts padding. Dropout draws are
    shared by the experts; the code draws one each.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "learned_threshold", "max_threshold": max_threshold},
        balance=balance_of(balance_coef, z_loss_coef, "threshold"),
        **peft_words,
    )
