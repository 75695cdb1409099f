"""What the forward of a model takes, asked of its class: trainers replace the forward of an instance."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def base_of(model: Any) -> Any:
    """The model below PEFT's wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def takes_logits_to_keep(model: Any) -> bool:
    """Whether a model can be asked for the logits of some positions only."""
    return "logits_to_keep" in inspect.signature(type(base_of(model)).forward).parameters


def without_logits(model: Any, device: Any) -> dict[str, Tensor]:
    """Arguments of a forward whose logits nobody reads: those of one position, where the model can be asked.

    The number 1 would stand for a slice, and on the CPU torch multiplies each row of a slice by its own copy of the
    head: longer than the rest of the forward.
    """
    if not takes_logits_to_keep(model):
        return {}
    return {"logits_to_keep": torch.zeros(1, dtype=torch.long, device=device)}
