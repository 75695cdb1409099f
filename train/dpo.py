"""Direct preference optimisation (https://huggingface.co/papers/2305.18290): prefer one answer to another.

A row has `prompt`, `chosen` and `rejected`. The loss is -log sigmoid(beta * margin). The margin is the log ratio of the
chosen answer's likelihoods under the model and under a reference, less that of the rejected answer. The reference is
the model as it is at the start, so that the first step has the margin 0 and the loss ln 2.
"""

from __future__ import annotations

from moelora import MoeLoraDPOTrainer
from moelora.runs.config import RunConfig
from train import sft


def run(config: RunConfig, *, restart: bool = False) -> None:
    """Train what `config` says; see `train.sft.run`."""
    sft.run(config, restart=restart, trainer_class=MoeLoraDPOTrainer)
