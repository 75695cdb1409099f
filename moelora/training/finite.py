"""Training that has gone wrong stops: a loss, a gradient or a weight that is no number names its step and batch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import TrainingError

_ADVICE = (
    "Nothing was saved since the last checkpoint. Lower learning_rate, or a coefficient of the balance; if it is "
    "always the same batch, look at its rows."
)


def check_loss(loss: Tensor, step: int, batch: int, inputs: Any, tokenizer: Any) -> None:
    """Refuse a loss that is NaN or infinite.

    Args:
        loss: The loss of a micro-batch.
        step: Number of the optimizer step, from 1.
        batch: Number of the micro-batch in it, from 1.
        inputs: The batch.
        tokenizer: Reads its tokens for the message; anything without `decode` is not asked.

    Raises:
        TrainingError: Names step and batch.
    """
    if not bool(torch.isfinite(loss).all()):
        value, rows = float(loss.detach().mean()), _rows(inputs, tokenizer)
        raise TrainingError(f"the loss is {value} in step {step}, batch {batch} of the step{rows}. {_ADVICE}")


def check_gradient(norm: Any, step: int) -> None:
    """Refuse a norm of gradients that is NaN or infinite, before the weights are changed.

    Args:
        norm: The norm; None where it is not known.
        step: Number of the optimizer step, from 1.

    Raises:
        TrainingError: Names the step.
    """
    if norm is not None and not math.isfinite(float(norm)):
        raise TrainingError(f"the gradient's norm is {float(norm)} in step {step}, with a finite loss. {_ADVICE}")


def check_weights(model: nn.Module, step: int) -> None:
    """Refuse weights that are NaN or infinite, before they are saved.

    Args:
        model: The model; what is trained of it is looked at.
        step: Number of optimizer steps that were done.

    Raises:
        TrainingError: Names the step and the first such tensor.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not bool(parameter.detach().isfinite().all()):
            raise TrainingError(f"{name} holds NaN or infinity after step {step}, so it is not saved. {_ADVICE}")


def _rows(inputs: Any, tokenizer: Any) -> str:
    """What a message says of a batch: how large it is, and how its first row begins."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2:
        return ""
    size = f" ({ids.shape[0]} rows of {ids.shape[1]} tokens"
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        return f"{size})"
    return f"{size}, the first begins with {decode(ids[0, :40], skip_special_tokens=True)[:60]!r})"
