"""The cases that two data-parallel processes and one must agree on; as a program, one of the two processes.

    torchrun --nproc_per_node 2 -m tests.training.two_processes FILE

Each case is cut for `world` processes so that the optimizer steps hold the same rows.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from trl import SFTConfig

from moelora import MoeLoraSFTTrainer
from tests.adapters import adapted, adapter_tensors
from tests.training.draws import fixed_draws
from tests.training.runs import checkpointing_words, sft_rows, tiny_tokenizer, toy_rows, train

BALANCED: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}
SMORA: dict[str, Any] = {"bias_update_rate": 0.05, "balance_coef": 1.0, "lora_alpha": 0.3}


# Every expert is in every graph, so DDP need not look for unused parameters (with reentrant checkpointing it cannot).
FIND_NONE: dict[str, Any] = {"ddp_find_unused_parameters": False}


def supervised() -> dict[str, Any]:
    return {
        "trainer_class": MoeLoraSFTTrainer,
        "arguments_class": SFTConfig,
        "trainer_words": {"processing_class": tiny_tokenizer()},
    }


def case(
    preset: str, words: dict[str, Any], *, accumulate: int = 1, sft: bool = False, **settings: Any
) -> Callable[[int], dict[str, Any]]:
    """A run of two steps over eight rows."""

    def run(world: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = adapted(preset, **words)
        with fixed_draws():  # of the one preset that draws
            found = train(
                model,
                toy_rows(8) if not sft else sft_rows(8),
                batch=4 // accumulate // world,
                accumulate=accumulate,
                max_steps=2,
                ddp_backend="gloo" if world > 1 else None,
                **FIND_NONE | settings | (supervised() if sft else {}),
            )
        biases = {name: tensor for name, tensor in adapter_tensors(model).items() if name.endswith(".bias")}
        logs = [
            {key: value for key, value in log.items() if key == "loss" or key.endswith("_loss") or "load" in key}
            for log in found.logs
        ]
        return {"gradients": found.gradients, "logs": logs, "biases": biases}

    return run


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
    "mixlora": case("mixlora", BALANCED),
    "mixlora-accumulate": case("mixlora", BALANCED, accumulate=2, ddp_find_unused_parameters=None),
    "mixlora-pooled": case(
        "mixlora", {"balance_coef": 1.0, "balance_loss": "mixtral", "lora_alpha": 0.3}, accumulate=2
    ),
    "mixlora-non-reentrant": case("mixlora", BALANCED, accumulate=2, **checkpointing_words(False)),
    "mixlora-reentrant": case("mixlora", BALANCED, accumulate=2, **checkpointing_words(True)),
    "sira": case("sira", {"balance_coef": 1.0, "expert_dropout": 0.0, "lora_alpha": 0.3}),
    "smora": case("smora", SMORA),
    "smora-accumulate": case("smora", SMORA, accumulate=2),
    "smora-non-reentrant": case("smora", SMORA, **checkpointing_words(False)),
    "thor": case("thor", {"consistency_coef": 3.0}),
    "thor-accumulate": case("thor", {"consistency_coef": 3.0}, accumulate=2, ddp_find_unused_parameters=None),
    "sft-accumulate": case("mixlora", BALANCED, accumulate=2, sft=True),
}


def main(path: str) -> None:
    results = {name: run(2) for name, run in CASES.items()}
    assert dist.get_world_size() == 2
    torch.save(results, f"{path}.{os.environ['RANK']}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
