"""What presets share."""

from __future__ import annotations

import math
from typing import Any


def balance_of(coef: float, z_loss_coef: float, kind: str = "switch") -> list[dict[str, Any]]:
    """The balance losses of a preset, a load-balancing loss and a router z-loss; both are logged if one is added."""
    return [{"kind": kind, "coef": coef}, {"kind": "z", "coef": z_loss_coef}] if coef != 0 or z_loss_coef != 0 else []


def lora_experts(r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, **words: Any) -> dict[str, Any]:
    """The experts of a preset, with the words that all presets but SMoRA have; `words` add to them."""
    return {
        "kind": "lora",
        "r": r,
        "lora_alpha": lora_alpha,
        "lora_dropout": lora_dropout,
        "use_rslora": use_rslora,
        **words,
    }


def block_experts(r: int, lora_alpha: float, lora_dropout: float, use_rslora: bool, num_experts: int) -> dict[str, Any]:
    """The experts of the PERFT presets: A starts at N(0, sqrt(2 / r))."""
    words = {"num_experts": num_experts, "init": "normal", "init_std": math.sqrt(2 / r) if r > 0 else 1.0}
    return lora_experts(r, lora_alpha, lora_dropout, use_rslora, **words)
