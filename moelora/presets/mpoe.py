"""MPOE."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import balance_of


@preset(paper="2203.01104", verified="abstract only")
def mpoe(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    top_k: int = 2,
    ends: int = 8,
    gradient_mask: float = 0.75,
    balance_coef: float = 1e-2,
    z_loss_coef: float = 0.0,
    balance_loss: str = "switch",
    router_init_std: float = 0.02,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MPOE (arXiv 2203.01104), after the abstract: experts whose matrices are matrix product operators.

    The experts share the central tensor of each matrix, which holds most of the parameters, and have small auxiliary
    tensors of their own at its ends; a gradient mask on the centre evens out that it would be trained by all experts'
    tokens. See `MpoExperts` for the equation.

    Choices of ours: the paper decomposes the whole matrices of feed-forward experts, of T5 and GPT-2; here the experts
    are LoRAs of a frozen model, and their A and B are decomposed, so that the central tensor is as large as one LoRA.
    Three tensors to a matrix (a copy of the authors' code has five, and no truncated bonds, as here), sizes by `ends`.
    The mask is drawn for each element in each forward; its probability 0.75 is 1 - 2/8, the share of tokens that an
    expert's own tensors miss. How tensors start; MixLoRA's sites, 8 experts, top-2, and the coefficient 0.01, which is
    that of the copy, in Switch's form.
    """
    return MoeLoraConfig(
        experts={
            "kind": "mpo",
            "num_experts": num_experts,
            "r": r,
            "lora_alpha": lora_alpha,
            "lora_dropout": lora_dropout,
            "use_rslora": use_rslora,
            "ends": ends,
            "gradient_mask": gradient_mask,
        },
        placement="feed_forward",
        scores={"kind": "linear", "init_std": router_init_std},
        selection={"kind": "top_k", "k": top_k},
        balance=balance_of(balance_coef, z_loss_coef, balance_loss),
        **peft_words,
    )
