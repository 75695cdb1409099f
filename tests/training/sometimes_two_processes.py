"""Runs of which one process has images and the other has none; as a program, one of the two processes.

    torchrun --nproc_per_node 2 -m tests.training.sometimes_two_processes FILE

With `world` processes an optimizer step holds the same rows as with one.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import torch
import torch.distributed as dist

from tests.adapters import router_biases
from tests.llava import adapted_llava, collate, mixed_rows
from tests.training.runs import train

# Rows go to the processes in turn: the first has text only, the second an image in every row.
PATTERN = "titititi"
CASES: dict[str, dict[str, Any]] = {
    "mixlora": {"preset": "mixlora", "words": {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}},
    "mixlora-accumulate": {"preset": "mixlora", "words": {"balance_coef": 1.0, "lora_alpha": 0.3}, "accumulate": 2},
    "smora": {"preset": "smora", "words": {"balance_coef": 1.0, "bias_update_rate": 0.05, "lora_alpha": 0.3}},
}


def run(name: str, world: int) -> dict[str, Any]:
    """Two optimizer steps of four rows each."""
    case = CASES[name]
    accumulate = case.get("accumulate", 1)
    torch.manual_seed(0)
    model = adapted_llava(case["preset"], **case["words"])
    found = train(
        model,
        mixed_rows(PATTERN),
        batch=4 // accumulate // world,
        accumulate=accumulate,
        max_steps=2,
        remove_unused_columns=False,
        trainer_words={"data_collator": collate},
        ddp_backend="gloo" if world > 1 else None,
        ddp_timeout=40,
    )
    logs = [
        {key: value for key, value in log.items() if key in ("loss", "balance_loss", "z_loss") or "load" in key}
        for log in found.logs
    ]
    return {"gradients": found.gradients, "logs": logs, "biases": router_biases(model)}


def main(path: str) -> None:
    results = {name: run(name, 2) for name in CASES}
    assert dist.get_world_size() == 2
    torch.save(results, f"{path}.{os.environ['RANK']}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
