"""What all regimes have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from moelora.runs.folder import RunDir, task_stage
from moelora.runs.models import ModelSource, load_adapter, load_model


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a regime trains with.

    Args:
        source: The base model.
        tokenizer: Its tokenizer.
        folder: Where everything goes.
        rows: Training rows by task, in the order in which the tasks come.
        fit_rows: The first rows of each, for routers.
        seed: Of the training.
        make_config: Makes the adapter's `PeftConfig`.
        adapter_dtype: As in a run.
        arguments: Makes the trainer's arguments for a stage; keywords replace fields.
        label: What messages call it.
        trainer_class: The class of the trainer.
        parts: Of a composition, the folders of its LoRAs by task.
    """

    source: ModelSource
    tokenizer: Any
    folder: RunDir
    rows: dict[str, Any]
    fit_rows: dict[str, Any]
    seed: int
    make_config: Callable[[], Any]
    adapter_dtype: str
    arguments: Callable[..., Any]
    label: str
    trainer_class: Callable[..., Any]
    parts: dict[str, Path] | None = None

    def new_adapter(self) -> Any:
        """The base model with a fresh adapter."""
        from train.sft import new_adapter

        return new_adapter(load_model(self.source), self.make_config(), self.adapter_dtype)

    def train(self, stage: str, make_model: Callable[[], Any], rows: Any, **changes: Any) -> Path:
        """Train one adapter, from where it was when the process died; its folder.

        Args:
            stage: Its name in the folder.
            make_model: Makes the model with the adapter to train.
            rows: What it is trained on.
            **changes: Arguments of the trainer that differ.
        """
        from train.sft import train_stage

        train_stage(
            stage,
            make_model,
            self.arguments(stage, **changes),
            self.folder,
            self.tokenizer,
            rows,
            label=f"{self.label} {stage}".strip(),
            trainer_class=self.trainer_class,
        )
        return self.folder.stage(stage)

    def load(self, adapter: Path) -> Any:
        """The base model with an adapter, to be scored."""
        return load_adapter(load_model(self.source), str(adapter)).eval()

    def continued(self, adapter: Path) -> Any:
        """The base model with an adapter, to be trained further."""
        return load_adapter(load_model(self.source), str(adapter), is_trainable=True)


@dataclass(kw_only=True)
class Regime:
    """How a method sees the tasks.

    Attributes:
        kind: Its name in YAML.
    """

    kind: ClassVar[str]
    is_per_task: ClassVar[bool] = False
    """Whether each task has an adapter of the given size."""
    answers_with_one: ClassVar[bool] = True
    """Whether one adapter of the given size answers a prompt; else what is active per token is not counted."""
    trains_itself: ClassVar[bool] = False
    """Whether it brings its own trainer, which trains on answers."""

    @property
    def made_of(self) -> str | None:
        """Of a composition, the method whose LoRAs it is made of."""
        return None

    def size(self, one: int, tasks: int) -> int:
        """Trainable parameters in the end.

        Args:
            one: Those of one adapter.
            tasks: Number of tasks.
        """
        return one * tasks if self.is_per_task else one

    def train(self, work: Work) -> dict[str, Path]:
        """Train, or resume.

        Returns:
            The folder of what was there after each task, by task; empty where tasks do not come one after the other.
        """
        raise NotImplementedError

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """The models to be scored in the end, each with the tasks that it answers."""
        raise NotImplementedError


class OneAfterTheOther(Regime):
    """Base of those that see one task after the other and leave an adapter after each."""

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """The last adapter answers everything."""
        yield list(tasks), work.load(work.folder.stage(task_stage(len(work.rows), list(work.rows)[-1])))


def joined(rows: Mapping[str, Any], tasks: Sequence[str]) -> Any:
    """The rows of some tasks as one set."""
    from datasets import concatenate_datasets

    return concatenate_datasets([rows[task] for task in tasks])


def save_only(model: Any, adapter: str, folder: Path) -> None:
    """Save one of a model's LoRAs as if it were the only one; PEFT puts all but "default" into a folder of the name."""
    model.save_pretrained(str(folder), selected_adapters=[adapter])
    for file in list((folder / adapter).iterdir()):
        file.rename(folder / file.name)
    (folder / adapter).rmdir()
