"""MOELoRA."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import lora_experts
from moelora.validation import check, is_count


@preset(paper="2310.18339", verified="official code's formula")
def moelora_task(
    *,
    r: int = 16,
    lora_alpha: float = 32,
    lora_dropout: float = 0.1,
    num_experts: int = 8,
    num_tasks: int = 8,
    task_features: int = 64,
    **peft_words: Any,
) -> MoeLoraConfig:
    """MOELoRA (arXiv 2310.18339): experts on every linear, weighted by the task of a sequence, not by its tokens.

        w = softmax(W_g t),   y = W0 x + (alpha / r) sum_e w_e B_e A_e x,   t the embedding of the task

    `r` is the **total** rank: each of the experts has r / num_experts. Batches need `task_ids`, a number from 0 to
    num_tasks - 1 for each sequence. One gate serves all sites. At a fixed task the mixture is one LoRA of rank r, as
    which `moelora export --to lora` writes it. No auxiliary loss. Rank 16 and 8 experts are the paper's; A starts at
    N(0, 0.01), B at 0.

    Unverified choices: alpha, the dropout and the size of the embedding are ours.
    """
    check(
        is_count(r) and is_count(num_experts) and r % num_experts == 0, "r", r, f"a multiple of {num_experts} experts"
    )
    return MoeLoraConfig(
        experts=lora_experts(
            r // num_experts,
            lora_alpha / num_experts,
            lora_dropout,
            use_rslora=False,
            num_experts=num_experts,
            init="normal",
            init_std=0.01,
        ),
        placement={"kind": "linear", "routers": "per_model"},
        scores={"kind": "task_embedding", "num_tasks": num_tasks, "features": task_features},
        selection="dense",
        **peft_words,
    )
