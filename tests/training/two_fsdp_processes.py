"""FSDP2 as two processes and as one; as a program, one of the two processes that accelerate starts.

accelerate launch --num_processes 2 --use_fsdp --fsdp_version 2 ... -m tests.training.two_fsdp_processes FILE
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import DistributedType, PartialState
from torch.distributed.tensor import DTensor

from moelora import MoeLoraTrainer
from tests.adapters import adapted
from tests.training.processes import save_results
from tests.training.runs import arguments, checkpointing_words, toy_rows
from tests.training.two_processes import BALANCED, processes

CASES: dict[str, dict[str, Any]] = {
    "plain": {"max_grad_norm": 0.1},
    "accumulated": {"gradient_accumulation_steps": 2, **checkpointing_words(False)},
}


def trained(folder: Path, world: int, *, resume: bool = False, **words: Any) -> dict[str, Any]:
    """Four steps of mixlora with a checkpoint after the third, or one from there on; saved in `folder / "adapter"`."""
    torch.manual_seed(0)
    model = adapted("mixlora", **BALANCED)
    rows_at_once = 4 // world // words.get("gradient_accumulation_steps", 1)
    args = arguments(
        output_dir=str(folder),
        per_device_train_batch_size=rows_at_once,
        max_steps=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        **processes(world),
        **words,
    )
    if world > 1:
        # accelerate shards on accelerators only, and on CPUs falls back to DDP without a word: say that these are some
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = MoeLoraTrainer(model=model, args=args, train_dataset=toy_rows(8))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-3") if resume else None)
    trainer.save_model(str(folder / "adapter"))
    parameters = list(trainer.model.parameters())
    logs = [
        {key: log[key] for key in ("loss", "balance_loss", "z_loss", "grad_norm")}
        for log in trainer.state.log_history
        if "loss" in log
    ]
    return {
        "logs": logs,
        "sharded": sum(isinstance(parameter, DTensor) for parameter in parameters),
        "parameters": len(parameters),
        "elements_here": sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in parameters),
        "fsdp": trainer.is_fsdp_enabled and trainer.accelerator.is_fsdp2,
    }


def main(path: str) -> None:
    results = {name: trained(Path(f"{path}-{name}"), 2, **words) for name, words in CASES.items()}
    results["resumed"] = trained(Path(f"{path}-plain"), 2, resume=True, **CASES["plain"])
    save_results(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
