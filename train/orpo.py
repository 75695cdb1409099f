"""Odds-ratio preference optimisation (https://huggingface.co/papers/2403.07691): preferences without a reference.

A row has `prompt`, `chosen` and `rejected`. The loss is that of fine-tuning on the chosen answer, less beta times the
log sigmoid of the log ratio of the odds of the two answers. TRL keeps the trainer in `trl.experimental`.
"""

from __future__ import annotations

from moelora import MoeLoraORPOTrainer
from moelora.runs.config import RunConfig
from train import sft


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=MoeLoraORPOTrainer)
