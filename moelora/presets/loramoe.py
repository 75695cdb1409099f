"""LoRAMoE."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.common import lora_experts


@preset(paper="2312.09979", verified="golden values")
def loramoe(
    *,
    r: int = 4,
    lora_alpha: float = 32,
    lora_dropout: float = 0.05,
    use_rslora: bool = False,
    num_experts: int = 8,
    balance_coef: float = 0.1,
    delta: float = 0.1,
    first_tasks: list[int] | None = None,
    z_loss_coef: float = 0.0,
    router_init_std: float | None = None,
    **peft_words: Any,
) -> MoeLoraConfig:
    """LoRAMoE (arXiv 2312.09979): dense soft routing over LoRA experts on the feed-forward linears, by halves of tasks.

        p = softmax(W_r x),   y = W0 x + (alpha / r) sum_e p_e B_e A_e x
        loss = CV^2(I * Q),   Q_ne the sum of p_e over sequence n, I_ne = 1 + delta or 1 - delta

    I is larger where the half of the experts that e is in is that of n's task: the first half of the tasks in
    `first_tasks` (`[1]` by default, as in the code, whose tasks are 0 and 1), the second half of all others. Training
    batches need `task_ids`, a number for each sequence; generation does not. Without the loss it is `molora` on those
    linears. The loss is not linear in the tokens: see `moelora.balance.localized` for what accumulation does.

    W_r and A start kaiming-uniform, B at 0. Experts, rank, alpha and dropout are those of the authors' script.

    Deviations: the loss is the mean over the layers (the code sums), and padding does not count in Q. The script
    switches the loss off (weight 0); `balance_coef` and `delta` 0.1 are ours.
    """
    tasks = [1] if first_tasks is None else first_tasks
    balance = [
        {"kind": "localized", "coef": balance_coef, "delta": delta, "first_tasks": tasks},
        {"kind": "z", "coef": z_loss_coef},
    ]
    return MoeLoraConfig(
        experts=lora_experts(r, lora_alpha, lora_dropout, use_rslora, num_experts=num_experts),
        placement={"kind": "parts", "parts": ["gate", "up", "down"]},
        scores={"kind": "linear", "init_std": router_init_std},
        selection="dense",
        balance=[choice for choice in balance if choice["coef"] != 0],
        **peft_words,
    )
