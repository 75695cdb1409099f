"""PERFT-R."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, block_experts


@preset(paper="2411.08212", verified="official code's formula")
def perft_r(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 4,
    top_k: int = 2,
    renormalize: bool = True,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "mixtral",
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """PERFT-R (arXiv 2411.08212): LoRAs across each mixture-of-experts block of the base, with a router of their own.

        y = block(x) + sum_{j in top-k} g_j(x) (alpha / r) B_j A_j x,   g = softmax(W_r x)

    For base models that are mixtures of experts already (Mixtral, OLMoE, Qwen3-MoE). The top-k weights are
    renormalised, as in Mixtral; for OLMoE, whose own are not, the code has `renormalize=False`. A starts at N(0,
    sqrt(2/r)), W_r as `nn.Linear`. Defaults: r 16, alpha 32, dropout 0.05, coefficient 0.01 in Mixtral's form, as in
    the code; the paper tries 1 of 1 to 2 of 8 and 4 of 4, here 2 of 4.

    Deviations: B starts at 0 (the code's at 1e-6 randn). Dropout draws are shared by the experts. The auxiliary loss on
    the base's own router is left to the base model: its router is frozen. The parallel bottleneck adapter that the
    paper offers as another expert is not here. The code for OLMoE weighs the adapters
    with the base's router, by mistake, so that the adapters' router gets no gradient; here it is as in the paper and in
    the code for Mixtral.
    """
    return MoeLoraConfig(
        experts=block_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts),
        placement="moe_block",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_k", "k": top_k, "renormalize": renormalize},
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
