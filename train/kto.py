"""Kahneman-Tversky optimisation (https://huggingface.co/papers/2402.01306): answers that are rated one by one.

A row has `prompt`, `completion`, and `label`: whether the answer is good. The reference is the model as it is at the
start, so that all rewards of the first step are 0.
"""

from __future__ import annotations

from moelora import MoeLoraKTOTrainer
from moelora.runs.config import RunConfig
from train import sft


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=MoeLoraKTOTrainer)
