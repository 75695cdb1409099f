"""SiRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of, lora_experts


@preset(paper="2311.09179", verified="abstract only")
def sira(
    *,
    r: int = 4,
    lora_alpha: float = 4,
    lora_dropout: float = 0.0,
    use_rslora: bool = False,
    num_experts: int = 16,
    top_k: int = 4,
    expert_dropout: float = 0.5,
    capacity_factor: float | None = 1.25,
    capacity_in_eval: bool = False,
    renormalize: bool = False,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    router_init_std: float | None = None,
    routers: str = "per_site",
    **peft_words: Any,
) -> MoeLoraConfig:
    """SiRA (arXiv 2311.09179): sparse LoRA experts on every linear, with expert dropout and a capacity limit.

        G(x) = TopK(Dropout_p(softmax(W_r x)), k),   y = W0 x + s sum_e G(x)_e B_e A_e x

    No code was published and only the abstract could be checked: top-k routing, a capacity limit, "expert dropout on
    top of the gating network", and a load-balancing loss. **Unverified choices**: dropout acts on the softmax's output
    with the usual inverted scaling; the kept weights are not renormalised; 16 experts of rank 4, k = 4 and p = 0.5 are
    recalled, not read; `capacity_factor` 1.25 and `balance_coef` 1e-2 are ours, as is scaling 1 (`lora_alpha = r`).

    Deviations: GShard's auxiliary loss `(1/E) sum_e (c_e/S) m_e` differs from ours by a constant (k / E^2 at balance
    against 1). The capacity holds per sequence and in training only (`capacity_in_eval`): a global capacity would let
    the sequences of a batch influence each other. `routers="per_input"`, one router for linears of one input, is an
    option of ours for speed.
    """
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement={"kind": "linear", "routers": routers},
        scores={"kind": "linear", "init_std": router_init_std},
        selection={
            "kind": "top_k",
            "k": top_k,
            "renormalize": renormalize,
            "expert_dropout": expert_dropout,
            "capacity_factor": capacity_factor,
            "capacity_in_eval": capacity_in_eval,
        },
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
