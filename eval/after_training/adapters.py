"""The adapters that the verbs are run on: a run's mixture, and a plain LoRA for each of its tasks."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

from moelora.errors import RunError
from moelora.runs.config import RunConfig, training_config
from moelora.runs.data import load_rows
from moelora.runs.folder import ADAPTER, STAGES, RunDir
from moelora.runs.models import load_model, load_tokenizer

LORA = {"r": 5, "lora_alpha": 10, "target_modules": "all-linear"}
"""Each task's LoRA; four of them have about the trainable parameters of the quickstart's mixture."""
LORA_TRAINING = {"learning_rate": 2e-3}
"""Twice the mixture's, since a LoRA sees a quarter of the rows."""


def train_adapters(config: RunConfig, work: Path) -> tuple[Path, dict[str, Path]]:
    """Train what is not trained yet.

    Args:
        config: The run of the mixture, on reasoning-gym tasks.
        work: Folder of everything that is trained.

    Returns:
        The mixture's folder, and the LoRAs' by task.

    Raises:
        RunError: If the run has fewer than two tasks, or `work` holds what another configuration trained.
    """
    from train import sft

    if len(config.dataset.tasks or {}) < 2:
        raise RunError("the run has fewer than two tasks (`dataset.tasks`); allowed: at least two LoRAs to compose.")
    mixture = dataclasses.replace(config, output_dir=str(work / "mixture"), baseline=None)
    sft.run(mixture)
    return RunDir(work / "mixture").stage(ADAPTER), _train_loras(config, work / "loras")


def _train_loras(config: RunConfig, root: Path) -> dict[str, Path]:
    from peft import LoraConfig

    from train import sft

    training = {**config.training, **LORA_TRAINING}
    config = dataclasses.replace(config, output_dir=str(root), baseline=None, training=training)
    folder, tokenizer = RunDir(root), load_tokenizer(config)
    folder.open(config)
    folder.check_rows(load_rows(config.dataset, tokenizer))

    def new_lora() -> Any:
        return sft.new_adapter(load_model(config), LoraConfig(**LORA, task_type="CAUSAL_LM"), config.adapter_dtype)

    loras = {}
    for task in config.dataset.tasks or {}:
        stage = f"{STAGES}/{task}"
        rows = rows_of_task(config, task, tokenizer)
        args = training_config(config, folder.checkpoints(stage))
        sft.train_stage(stage, new_lora, args, folder, tokenizer, rows, label=f"LoRA of {task}")
        loras[task] = folder.stage(stage)
    return loras


def rows_of_task(config: RunConfig, task: str, tokenizer: Any) -> Any:
    """The training rows of one task."""
    dataset = copy.deepcopy(config.dataset)
    dataset.tasks = {task: (config.dataset.tasks or {})[task]}
    return load_rows(dataset, tokenizer)
