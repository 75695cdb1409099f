"""The plain LoRA that a mixture is compared with."""

from __future__ import annotations

from typing import Any

from train.errors import RunError
from train.models import load_skeleton
from train.schema import BaselineConfig, RunConfig

# How far the number of trainable parameters of a matched LoRA may be from the adapter's.
TOLERANCE = 0.02


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
        target = adapter.num_trainable_parameters(load_skeleton(config))
        unit = _parameters_of_rank_one(load_skeleton(config), baseline.target_modules)
        r = max(1, round(target / unit))
        if abs(r * unit - target) > TOLERANCE * target:
            raise RunError(
                f"baseline.r is 'match', but the adapter has {target:,} trainable parameters and a LoRA on "
                f"{baseline.target_modules!r} has {unit:,} a rank: the nearest rank, {r}, is "
                f"{r * unit / target - 1:+.1%} off, allowed: {TOLERANCE:.0%}. Set baseline.r to a number, or change "
                "adapter.r or adapter.num_experts."
            )
    alpha = baseline.lora_alpha
    return LoraConfig(
        r=r,
        # alpha / r as in the adapter's own experts, so that both see the same learning rate.
        lora_alpha=r * adapter.scaling if alpha is None else alpha,
        lora_dropout=adapter.experts.lora_dropout if baseline.lora_dropout is None else baseline.lora_dropout,
        target_modules=baseline.target_modules,
        task_type=adapter.task_type,
    )


def _parameters_of_rank_one(skeleton: Any, target_modules: str | list[str]) -> int:
    """Trainable parameters of a LoRA of rank one."""
    import torch
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = get_peft_model(skeleton, LoraConfig(r=1, target_modules=target_modules))
    return int(model.get_nb_trainable_parameters()[0])
