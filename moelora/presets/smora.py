"""SMoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of


@preset(paper="2501.15103", verified="golden values")
def smora(
    *,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    top_k: int = 8,
    bias_update_rate: float = 1e-5,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    routers: str = "per_site",
    **peft_words: Any,
) -> MoeLoraConfig:
    """SMoRA (arXiv 2501.15103): `r` experts of rank one on every linear, `top_k` of them active.

        v = sigmoid(W_r x) + b,   y = W0 x + alpha sum_{i in top-k} (v_i / sum v) B[:, i] (A[i, :] x)

    as in the authors' current code: the biased score both selects and weights, and after every training forward
    `b += u sign(mean(n) - n)` with n the number of tokens of each expert. `r` is the **total** rank.

    Deviations: the official code's router sees the input after LoRA dropout, ours before it (the same at the default
    0); padding is not counted in n and the counts of all data-parallel processes are summed (the official processes
    drift apart); the bias does not move again when checkpointing recomputes. Whether the paper's own gate is a softmax
    or a sigmoid could not be checked; this is the code's. The sum of v is kept away from 0 by 1e-9.
    `routers="per_input"`, one router for linears of one input, is an option of ours for speed.
    """
    return MoeLoraConfig(
        experts={"kind": "lora", "num_experts": r, "r": 1, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout},
        placement={"kind": "linear", "routers": routers},
        scores={
            "kind": "linear",
            "activation": "sigmoid",
            "init_std": router_init_std,
            "bias": bias_update_rate != 0,
        },
        selection={"kind": "top_k", "k": top_k},
        balance=[
            *([{"kind": "bias_update", "coef": bias_update_rate}] if bias_update_rate != 0 else []),
            *balance_of(balance_coef, z_loss_coef),
        ],
        **peft_words,
    )
