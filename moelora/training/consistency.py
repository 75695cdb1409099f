"""Two forwards of a batch beside the trainer's own, and how far their predictions are apart.

The trainer's loss may hide the logits (TRL fuses the head into the loss) or be another than that of labels, so the
predictions come from forwards without a loss, of the labelled positions only where the model can be asked for them.

Shape suffixes: B rows, S tokens of a row, N positions that have a label, V words of the vocabulary or classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.balance.base import Balance
from moelora.errors import ConfigError
from moelora.forward import takes_logits_to_keep


def compare_forwards(
    model: nn.Module, base: Any, inputs: Mapping[str, Any], labels: Tensor, choices: Sequence[Balance]
) -> tuple[list[Tensor], int]:
    """Run a batch twice.

    Args:
        model: What is called.
        base: The model below all wrappers.
        inputs: What its forward takes of the batch, without a loss where it can do without.
        labels: [B, S], or one for each row; -100 where nothing is predicted.
        choices: What compares the two.

    Returns:
        A sum over the labelled positions for each choice, with gradients, and the number N of these positions.
    """
    first_NV, second_NV = (_predictions(model, base, inputs, labels) for _ in range(2))
    return [choice.compared(first_NV, second_NV) for choice in choices], len(first_NV)


def labels_of(inputs: Any, trainer: str) -> Tensor:
    """The labels of a batch.

    Args:
        inputs: The batch.
        trainer: Name of the trainer.

    Raises:
        ConfigError: If it has none, as batches of preferences.
    """
    of_model = isinstance(inputs, Mapping) and {"input_ids", "inputs_embeds"} & set(inputs)
    labels = inputs.get("labels") if of_model else None
    if not isinstance(labels, Tensor):
        raise ConfigError(
            "the adapter has a consistency loss, which compares predictions where there are labels, and the batches "
            f"of {trainer} are not inputs of the model with labels; allowed: trainers of labelled rows, such as "
            "MoeLoraTrainer and MoeLoraSFTTrainer. Set consistency_coef=0 to train without it."
        )
    return labels


def _predictions(model: nn.Module, base: Any, inputs: Mapping[str, Any], labels: Tensor) -> Tensor:
    """The logits of the positions that have a label, [N, V]."""
    # without a loss of its own name (GPT-2) a model has that of causal language models
    causal = getattr(base, "loss_type", None) in (None, "ForCausalLM") and not base.config.is_encoder_decoder
    if not causal:
        logits: Tensor = model(**inputs).logits
        return logits[labels != -100] if labels.shape == logits.shape[:-1] else logits
    # a label is what the position before it predicts
    counts_BS = torch.cat([labels[:, 1:] != -100, torch.zeros_like(labels[:, :1], dtype=torch.bool)], 1)
    if not takes_logits_to_keep(base):
        return torch.as_tensor(model(**inputs).logits)[counts_BS]
    kept = counts_BS.any(0).nonzero().squeeze(-1)
    return torch.as_tensor(model(**inputs, logits_to_keep=kept).logits)[counts_BS[:, kept]]
