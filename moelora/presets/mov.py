"""MoV."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of


@preset(paper="2309.05444", verified="official code's formula")
def mov(
    *,
    num_experts: int = 10,
    balance_coef: float = 0.0,
    z_loss_coef: float = 0.0,
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MoV (arXiv 2309.05444): (IA)^3 vectors as experts of keys, values and feed-forward activations, all weighted.

        p = softmax(W_r a),   a' = a * sum_e p_e l_e

    where a is the activation that is scaled: each head of the keys and of the values, and the input of a feed-forward
    block's last linear. The vectors start at 1, W_r at N(0, 0.02); one W_r [E, head features] serves all heads of a
    projection, each head has vectors of its own, as in the authors' code. Defaults are theirs: 10 vectors (they go up
    to 60). One vector is PEFT's `IA3Config`. There is no rank, no alpha and no dropout.

    Deviations: none known. The authors' options that are off by default (top-k, jitter) are left out; `balance_coef` is
    in this package's convention.
    """
    return MoeLoraConfig(
        experts={"kind": "vector", "num_experts": num_experts},
        placement="parts",
        scores={"kind": "linear", "init_std": router_init_std},
        selection="dense",
        balance=balance_of(balance_coef, z_loss_coef),
        **peft_words,
    )
