"""MixDoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2404.15159", verified="official code's formula")
def mixdora(
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
    """MixDoRA (arXiv 2404.15159): MixLoRA with DoRA (arXiv 2402.09353) in the place of LoRA, in experts and beside.

    Each linear of expert e, with W and b frozen and shared by all, is

        c_e (W x + s B_e A_e x) + b,   c_e = m_e / ||W + s B_e A_e||   (norms of rows, without gradient)

    and everything else is as in `mixlora`, with the same words and defaults. m starts at the norms of W. One expert is
    PEFT's DoRA, whose way with dropout it has too. Since c_e stands behind the last linear, that linear runs for each
    chosen expert, not once for all as in `mixlora`; a quantised base is dequantised for its norms at each forward, as
    in PEFT.

    Deviations: as of `mixlora`. The authors' code does not save the magnitudes, so that an adapter loses them when it
    is loaded again; here they are saved, in fp32.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts, kind="dora"),
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
