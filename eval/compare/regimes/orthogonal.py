"""A new LoRA for each task, kept orthogonal to the ones before: O-LoRA.

Shape suffixes: R rank, D features in.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor

from eval.compare.regimes.base import OneAfterTheOther, Work, save_only
from moelora.errors import RunError
from moelora.files import new_folder
from moelora.runs.folder import task_stage
from moelora.runs.models import load_model

_OLD, _NEW = "old", "default"


@dataclass(kw_only=True)
class Orthogonal(OneAfterTheOther):
    """Like O-LoRA (Wang et al. 2023): all LoRAs add up, the old ones are frozen, and the loss of a new one has

        weight * sum over the linears of sum |A_old A_new^T|

    so that it learns in directions that the old ones do not read.

    Args:
        weight: Of the penalty; the paper's lambda_1 is 0.5.
    """

    kind: ClassVar[str] = "orthogonal"
    is_per_task: ClassVar[bool] = True
    answers_with_one: ClassVar[bool] = False
    trains_itself: ClassVar[bool] = True

    weight: float = 0.5

    def __post_init__(self) -> None:
        if self.weight < 0:
            raise RunError(f"weight is {self.weight}; allowed: a number of at least 0.")

    def train(self, work: Work) -> dict[str, Path]:
        """One training for each task; one that was stopped starts anew, since the trainer resumes single adapters."""
        done: dict[str, Path] = {}
        before: Path | None = None
        for index, (task, rows) in enumerate(work.rows.items()):
            own, stage = f"own/{index + 1}-{task}", task_stage(index + 1, task)
            if before is None:
                adapter = work.train(own, work.new_adapter, rows)
            else:
                adapter = self._train_beside(work, own, partial(_beside, work, before), rows)
            if not work.folder.is_finished(stage):
                _sum(work, before, adapter, work.folder.stage(stage))
            before = done[task] = work.folder.stage(stage)
        return done

    def _train_beside(self, work: Work, stage: str, make: Any, rows: Any) -> Path:
        from train.sft import RunTrainer, train_stage

        weight = self.weight

        class Trainer(RunTrainer):
            """Adds the penalty to the loss."""

            def compute_loss(self, model: Any, inputs: Any, *arguments: Any, **words: Any) -> Any:
                found = super().compute_loss(model, inputs, *arguments, **words)
                penalty = weight * overlap(self.accelerator.unwrap_model(model))
                return (found[0] + penalty, *found[1:]) if isinstance(found, tuple) else found + penalty

        arguments = work.arguments(stage, save_strategy="no")
        label = f"{work.label} {stage}"
        train_stage(stage, make, arguments, work.folder, work.tokenizer, rows, label=label, trainer_class=Trainer)
        return work.folder.stage(stage)


def overlap(model: Any) -> Tensor:
    """Sum of |A_old A_new^T| over all linears of a model with both adapters."""
    total: Any = 0.0
    for module in model.modules():
        factors = getattr(module, "lora_A", None)
        if factors is not None and _OLD in factors and _NEW in factors:
            old_RD, new_RD = factors[_OLD].weight, factors[_NEW].weight
            total = total + (old_RD.float() @ new_RD.float().T).abs().sum()
    if not isinstance(total, Tensor):
        raise RunError("no linear has an old and a new LoRA; the penalty has nothing to act on.")
    return total


def _beside(work: Work, before: Path) -> Any:
    """The base model with the sum of the old LoRAs, frozen, and a fresh one."""
    from peft import PeftModel

    from train.sft import set_dtype

    base = load_model(work.source)
    model = PeftModel.from_pretrained(base, str(before), adapter_name=_OLD, autocast_adapter_dtype=False)
    model.add_adapter(_NEW, work.make_config(), autocast_adapter_dtype=False)
    model.base_model.set_adapter([_OLD, _NEW])
    for name, parameter in model.named_parameters():
        parameter.requires_grad = f".{_NEW}." in name
    return set_dtype(model, work.adapter_dtype)


def _sum(work: Work, before: Path | None, own: Path, whole: Path) -> None:
    """Write the sum of LoRAs as one of their total rank."""
    from peft import PeftModel

    with new_folder(whole) as ready:
        if before is None:
            # what its training took is noted there already
            shutil.copytree(own, ready, dirs_exist_ok=True, ignore=shutil.ignore_patterns("training.json"))
            return
        base = load_model(work.source)
        model = PeftModel.from_pretrained(base, str(before), adapter_name=_OLD, autocast_adapter_dtype=False)
        model.load_adapter(str(own), adapter_name=_NEW, autocast_adapter_dtype=False)
        model.add_weighted_adapter([_OLD, _NEW], [1.0, 1.0], "sum", combination_type="cat")
        save_only(model, "sum", ready)
