"""Polytropon."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset


@preset(paper="2202.13914", verified="PEFT")
def poly(
    *, r: int = 8, num_experts: int = 4, num_tasks: int = 8, num_splits: int = 1, **peft_words: Any
) -> MoeLoraConfig:
    """Polytropon (arXiv 2202.13914): an inventory of skills on every linear, mixed in weight space by the task.

        z = sigmoid(Z_t) (in training a relaxed Bernoulli draw),   w_s = z_s / sum(z)
        y = W0 x + (sum_s w_s B_s) (sum_s w_s A_s) x / r

    `num_experts` skills; batches need `task_ids`, a number from 0 to num_tasks - 1 for each sequence. A and B are mixed
    apart, so that it is no mixture of LoRAs, but at a fixed task it is one LoRA of rank r, as which `moelora export
    --to lora` writes it. Equal to PEFT's `PolyConfig`. With `num_splits` above 1 it is `mhr`.
    """
    return MoeLoraConfig(
        experts={"kind": "poly", "num_experts": num_experts * num_splits, "r": r, "num_splits": num_splits},
        scores={"kind": "task_table", "num_tasks": num_tasks, "groups": num_splits},
        selection="dense",
        **peft_words,
    )
