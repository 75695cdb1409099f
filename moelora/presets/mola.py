"""MoLA."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2402.08562", verified="golden values")
def mola(
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int | Sequence[int] = (2, 4, 6, 8),
    top_k: int = 2,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoLA (arXiv 2402.08562): MixLoRA's routing on every linear, with more experts in higher layers.

        p = softmax(W_r x),   y = W0 x + (alpha / r) sum_{e in top-k} (p_e / sum p) B_e A_e x

    `num_experts` is a number for all layers, or a list: one for each layer, or one for each of as many groups of
    layers of equal size, low to high. The default is the paper's MoLA inverted triangle 2, 4, 6, 8; a model whose
    layers it does not divide is refused. Rank 8, alpha 16, top-2, A and W_r kaiming, B 0 as in the authors' script.

    The loss is off, as in the authors' `mola_training.py`; their other script has 1e-3 times the **sum** over all
    routers of what is here the mean, so `balance_coef` is 1e-3 times the number of routers for the same strength.

    Deviations: the loss counts valid tokens only. Dropout draws are shared by the experts; 0.05 is ours.
    """
    counts = None if isinstance(num_experts, int) or not num_experts else list(num_experts)
    return MoeLoraConfig(
        experts=lora_experts(
            r,
            lora_alpha,
            lora_dropout,
            use_rslora,
            num_experts=max(counts) if counts else num_experts,
            per_layer=counts,
        ),
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_k", "k": top_k},
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
