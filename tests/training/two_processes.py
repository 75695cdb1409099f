"""The cases that two data-parallel processes and one must agree on; as a program, one of the two processes.

    torchrun --nproc_per_node 2 -m tests.training.two_processes FILE

Each case is cut for `world` processes so that the optimizer steps hold the same rows.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from trl import DPOConfig, SFTConfig

from moelora import MoeLoraDPOTrainer, MoeLoraSFTTrainer, MoeLoraTrainer, batch_facts
from tests.adapters import FAMILY, adapted, adapter_tensors, base_of
from tests.conftest import tiny_batch
from tests.llava import adapted_llava, collate, mixed_rows
from tests.training.draws import fixed_draws
from tests.training.processes import save_results
from tests.training.runs import (
    Rows,
    Run,
    arguments,
    checkpointing_words,
    preference_rows,
    sft_rows,
    tiny_tokenizer,
    toy_rows,
    train,
)

BALANCED: dict[str, Any] = {"balance_coef": 1.0, "z_loss_coef": 0.1, "lora_alpha": 0.3}
SMORA: dict[str, Any] = {"bias_update_rate": 0.05, "balance_coef": 1.0, "lora_alpha": 0.3}


# Every expert is in every graph, so DDP need not look for unused parameters (with reentrant checkpointing it cannot).
FIND_NONE: dict[str, Any] = {"ddp_find_unused_parameters": False}


def processes(world: int) -> dict[str, Any]:
    """The backend of several; one that waits for the other in vain gives up soon."""
    return {"ddp_backend": "gloo", "ddp_timeout": 100} if world > 1 else {}


def supervised() -> dict[str, Any]:
    return {
        "trainer_class": MoeLoraSFTTrainer,
        "arguments_class": SFTConfig,
        "trainer_words": {"processing_class": tiny_tokenizer()},
    }


def preferences() -> dict[str, Any]:
    return {
        "trainer_class": MoeLoraDPOTrainer,
        "arguments_class": DPOConfig,
        "trainer_words": {"processing_class": tiny_tokenizer()},
    }


def task_rows(count: int) -> Rows:
    """Rows of two tasks in turn: with one row in each batch, a process has none of the other's task."""
    return [{**row, "task_ids": torch.tensor(i % 2)} for i, row in enumerate(toy_rows(count))]


def case(
    preset: str, words: dict[str, Any], *, accumulate: int = 1, of: str = "", **settings: Any
) -> Callable[[int], dict[str, Any]]:
    """A run of two steps over eight rows, of the plain trainer, of "tasks", "sft" or "dpo"."""

    def run(world: int) -> dict[str, Any]:
        torch.manual_seed(0)
        model = adapted(preset, **words)
        with fixed_draws():  # of the one preset that draws
            found = train(
                model,
                {"tasks": task_rows, "sft": sft_rows, "dpo": preference_rows}.get(of, toy_rows)(8),
                batch=4 // accumulate // world,
                accumulate=accumulate,
                max_steps=2,
                **processes(world) | FIND_NONE | settings | {"sft": supervised, "dpo": preferences}.get(of, dict)(),
            )
        return results_of(found)

    return run


def results_of(run: Run) -> dict[str, Any]:
    """What is compared."""
    tensors = adapter_tensors(run.trainer.model)
    logs = [
        {key: value for key, value in log.items() if key == "loss" or key.endswith("_loss") or "load" in key}
        for log in run.logs
    ]
    biases = {name: tensor for name, tensor in tensors.items() if name.endswith(".bias")}
    return {"gradients": run.gradients, "logs": logs, "biases": biases}


def loss_of(preset: str, model: Any, rank: int) -> Tensor:
    """A process' loss, of its own rows, task and draws."""
    torch.manual_seed(rank)
    with batch_facts(task_ids=[rank]):
        loss: Tensor = model(**tiny_batch(base_of(preset), batch_size=2, seed=rank)).loss
    return loss


def mean_gradients(preset: str, rank: int | None = None) -> dict[str, Tensor]:
    """Gradients of the mean of two processes' losses: as process `rank` has them under DDP, or from a single one."""
    model = adapted(preset, base_of(preset)).train()
    if rank is None:
        torch.stack([loss_of(preset, model, each) for each in range(2)]).mean().backward()
    else:
        parallel = DistributedDataParallel(model)  # which sums the gradients as long as it lives
        loss_of(preset, parallel, rank).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def balanced(preset: str) -> Callable[[int], dict[str, Any]]:
    """A step of two micro-batches, one after the other or at once, with a balance loss of the preset's own."""

    def run(world: int) -> dict[str, Any]:
        rows = [{**row, "task_ids": torch.tensor(n % 2)} for n, row in enumerate(toy_rows(4))]
        model = adapted(preset, balance_coef=1.0, lora_alpha=0.3)
        return results_of(train(model, rows, batch=2, accumulate=2 // world, **processes(world), **FIND_NONE))

    return run


def images(preset: str, words: dict[str, Any], *, accumulate: int = 1) -> Callable[[int], dict[str, Any]]:
    """A run of two steps: rows go to the processes in turn, so that the first has text only and the second images."""

    def run(world: int) -> dict[str, Any]:
        torch.manual_seed(0)
        found = train(
            adapted_llava(preset, lora_alpha=0.3, **words),
            mixed_rows("titititi"),
            batch=4 // accumulate // world,
            accumulate=accumulate,
            max_steps=2,
            remove_unused_columns=False,
            trainer_words={"data_collator": collate},
            **processes(world),
        )
        return results_of(found)

    return run


def uneven(world: int) -> dict[str, Any]:
    """One step of three micro-batches, of which one process has two and the other one: nobody waits for a second."""
    torch.manual_seed(0)
    found = train(
        adapted("mixlora", **BALANCED),
        toy_rows(8)[:6],
        batch=2,
        accumulate=3 if world == 1 else 2,
        accelerator_config={"even_batches": False},
        **processes(world),
        **FIND_NONE,
    )
    return results_of(found)


def checkpointed(folder: str, world: int, *, resume: bool = False) -> dict[str, Tensor]:
    """What an adapter is after four steps with a checkpoint after the third, or after one from there on."""
    torch.manual_seed(0)
    model = adapted("mixlora", **BALANCED)
    args = arguments(
        output_dir=folder,
        per_device_train_batch_size=4 // world,
        max_steps=4,
        learning_rate=1e-2,
        save_strategy="steps",
        save_steps=3,
        **processes(world),
        **FIND_NONE,
    )
    trainer = MoeLoraTrainer(model=model, args=args, train_dataset=toy_rows(8))
    trainer.train(resume_from_checkpoint=f"{folder}/checkpoint-3" if resume else None)
    return adapter_tensors(model)


CASES: dict[str, Callable[[int], dict[str, Any]]] = {
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
    "thor-accumulate": case("thor", {"consistency_coef": 3.0}, accumulate=2, ddp_find_unused_parameters=None),
    "moelora_task": case("moelora_task", {"lora_alpha": 0.3}, accumulate=2, of="tasks"),
    "sft-accumulate": case("mixlora", BALANCED, accumulate=2, of="sft"),
    "dpo-accumulate": case("mixlora", BALANCED, accumulate=2, of="dpo"),
    "mixlora-images-accumulate": images("mixlora", {"balance_coef": 1.0, "z_loss_coef": 0.1}, accumulate=2),
    "smora-images": images("smora", {"balance_coef": 1.0, "bias_update_rate": 0.05}),
    "loramoe": balanced("loramoe"),
    "adamole": balanced("adamole"),
    "smore": balanced("smore"),
    "uneven": uneven,
}

# Presets of no trainer's case: their gradients alone.
OTHERS = [preset for preset in FAMILY if not any(name.split("-")[0] == preset for name in CASES)]


def main(path: str) -> None:
    results = {name: run(2) for name, run in CASES.items()}
    results["saved"] = checkpointed(f"{path}-two", 2)
    results["resumed"] = checkpointed(f"{path}-one", 2, resume=True)
    results["others"] = {preset: mean_gradients(preset, dist.get_rank()) for preset in OTHERS}
    save_results(results, path)


if __name__ == "__main__":
    main(sys.argv[1])
