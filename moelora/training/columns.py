"""Columns of a dataset that are facts of the batch rather than inputs of the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moelora.errors import ConfigError
from moelora.routing.batch import FACTS


class FactColumns:
    """A data collator that passes the columns of facts (`task_ids`, `instance_embedding`) by another one.

    Collators know the columns of their trainer, and drop, pad or refuse others.

    Args:
        collator: The trainer's own collator.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, examples: list[Any]) -> Any:
        """The batch of the trainer's collator, with a tensor for each fact: one entry for each example.

        Raises:
            ConfigError: If only some examples have a fact, or the trainer's batches are no inputs of a model.
        """
        if not examples or not isinstance(examples[0], dict):
            return self.collator(examples)
        found = [name for name in FACTS if any(name in example for example in examples)]
        if not found:
            return self.collator(examples)
        for name in found:
            lacking = sum(name not in example for example in examples)
            if lacking:
                raise ConfigError(f"{lacking} of {len(examples)} rows have no {name}; allowed: all rows, or none.")
        facts = {name: _stacked(name, [example[name] for example in examples]) for name in found}
        rest = [{key: value for key, value in example.items() if key not in found} for example in examples]
        batch = self.collator(rest)
        if not isinstance(batch, Mapping):
            raise ConfigError(
                f"the rows have {', '.join(found)}, and the trainer (GRPO) makes the model's inputs itself, without "
                "them; allowed: rows without them, and a routing that does not read them."
            )
        return {**batch, **facts}

    def __getattr__(self, name: str) -> Any:
        # trainers set and read options of their collator
        if name == "collator":
            raise AttributeError(name)
        return getattr(self.collator, name)


def _stacked(name: str, values: list[Any]) -> Tensor:
    try:
        return torch.stack([torch.as_tensor(value) for value in values])
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"the column {name} holds {values[0]!r}, ...; allowed: a number or a list of numbers of one length per row."
        ) from error
