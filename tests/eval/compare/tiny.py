"""A comparison that takes seconds: a tiny model, three methods, a few steps."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

from tests.runs.tiny import tiny_folder

WORDS: dict[str, Any] = {
    "model": None,
    "dtype": "float32",
    "protocol": "loglik",
    "output_dir": None,
    "results_dir": None,
    "data": {
        "tasks": ["arc_easy", "boolq", "winogrande"],
        "rows_per_task": 12,
        "selection_rows": 3,
        "steps": 4,
        "bucket": 2,
        "max_length": 120,
    },
    "training": {"per_device_train_batch_size": 2, "logging_steps": 1, "save_steps": 2, "dataloader_pin_memory": False},
    "selection": {"learning_rates": [0.01, 0.001], "steps": 2},
    "evaluation": {"limit": 3, "batch_size": 16, "routing_rows": 2},
    "reference": "mixlora",
    "methods": {
        "lora": {"title": "LoRA", "adapter": {"peft": "lora", "r": 49, "lora_alpha": 98}, "seeds": [0, 1]},
        "mixlora": {
            "title": "MixLoRA",
            "adapter": {"preset": "mixlora", "r": 24, "lora_alpha": 48, "num_experts": 3, "top_k": 1},
        },
    },
}


def write_benchmark(folder: Path, **changes: Any) -> Path:
    """The YAML file of a comparison, in `folder`.

    Args:
        folder: Gets the model, the YAML file, the work and the results.
        **changes: Top-level keys to replace.
    """
    words = {
        **copy.deepcopy(WORDS),
        "model": str(folder / "model"),
        "output_dir": str(folder / "work"),
        "results_dir": str(folder / "results"),
        **changes,
    }
    if not (folder / "model").exists():
        tiny_folder(folder / "model")
    file = folder / "benchmark.yaml"
    file.write_text(yaml.safe_dump(words))
    return file
