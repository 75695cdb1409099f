"""A reward model: a number for a text, higher for the answer that is preferred.

A row has `prompt`, `chosen` and `rejected`. The loss is -log sigmoid of the difference of the two numbers
(https://huggingface.co/papers/2203.02155). The head starts at random and is trained and saved with the adapter.
"""

from __future__ import annotations

from typing import Any

from moelora import MoeLoraRewardTrainer
from moelora.runs.config import RunConfig
from train import sft


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=MoeLoraRewardTrainer, model_words=_model_words)


def _model_words(rows: Any, tokenizer: Any) -> dict[str, Any]:
    # the number is read at the last token that is not padding
    return {"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}
