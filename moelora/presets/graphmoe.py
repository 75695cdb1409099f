"""GraphMoE."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of


@preset(paper="2501.07890", verified="abstract only")
def graphmoe(
    *,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.05,
    num_experts: int = 8,
    top_k: int = 2,
    rounds: int = 3,
    state_features: int = 16,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """GraphMoE (arXiv 2501.07890), after the abstract, experimental: several rounds of routing with a recurrent state.

    The abstract has experts as nodes of a pseudo-graph, a recurrent routing strategy that simulates steps of thinking,
    and information that flows among the experts, made with LoRAs. Neither equations nor code were at hand, so a result
    of this preset is none of the paper's. See `RoundsExperts` for the equation here.

    Choices of ours: all of it but that. A GRU of 16 features as the state, in the place of the paper's virtual node;
    three rounds; experts that see the state through one matrix of all of them; the last round's output; a mixture on
    each linear with MoLA's ranks and top-2; Switch's loss over all rounds.
    """
    return MoeLoraConfig(
        experts={
            "kind": "lora_rounds",
            "num_experts": num_experts,
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "features": state_features,
            "rounds": rounds,
        },
        placement="linear",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_k", "k": top_k},
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
