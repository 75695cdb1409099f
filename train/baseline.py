"""The plain LoRA that a mixture is compared with."""

from __future__ import annotations

from typing import Any

from moelora.errors import RunError
from moelora.runs.config import BaselineConfig, RunConfig
from moelora.runs.models import load_skeleton
from moelora.runs.parameters import TOLERANCE, count_parameters, is_equal_size


def baseline_config(config: RunConfig, baseline: BaselineConfig, adapter: Any) -> Any:
    """A `peft.LoraConfig`, with as many trainable parameters as `adapter` if its rank is to match.

    Args:
        config: The run.
        baseline: Its section of that name.
        adapter: The `MoeLoraConfig` to compare with.

    Raises:
        RunError: If no rank comes within 2 % of the adapter's number of trainable parameters.
    """
    from peft import LoraConfig

    r = baseline.r
    if r == "match":
        target, unit = sizes_to_match(config, baseline.target_modules, adapter)
        rank = max(1, round(target / unit))
        if not is_equal_size(rank * unit, target):
            raise RunError(
                f"baseline.r is 'match', but the adapter has {target:,} trainable parameters and a LoRA on "
                f"{baseline.target_modules!r} has {unit:,} per rank: the nearest rank, {rank}, is "
                f"{rank * unit / target - 1:+.1%} off, allowed: {TOLERANCE:.0%}. Set baseline.r to a number, or change "
                "adapter.r or adapter.num_experts."
            )
        r = rank
    alpha = baseline.lora_alpha
    return LoraConfig(
        r=r,
        # alpha / r as in the adapter's own experts, so that both see the same learning rate.
        lora_alpha=r * adapter.scaling if alpha is None else alpha,
        lora_dropout=adapter.experts.lora_dropout if baseline.lora_dropout is None else baseline.lora_dropout,
        target_modules=baseline.target_modules,
        task_type=adapter.task_type,
    )


def sizes_to_match(config: RunConfig, target_modules: str | list[str], adapter: Any) -> tuple[int, int]:
    """Trainable parameters of an adapter, and of a LoRA of rank one, without the head of a classifier.

    Args:
        config: The run.
        target_modules: Of the LoRA, as in PEFT.
        adapter: The `MoeLoraConfig`.
    """
    from peft import LoraConfig

    def trainable(peft_config: Any) -> int:
        return count_parameters(load_skeleton(config, adapter.task_type), peft_config).trainable

    one, two = (trainable(LoraConfig(r=r, target_modules=target_modules, task_type=adapter.task_type)) for r in (1, 2))
    head = 2 * one - two
    return trainable(adapter) - head, one - head
