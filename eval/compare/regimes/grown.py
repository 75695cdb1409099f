"""A mixture that gets an expert for each task, as `python -m train --recipe sequential` makes it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Stage, Work
from eval.compare.regimes.in_turn import stage_name
from moelora.runs.config import SequentialConfig
from moelora.runs.schema import build


@dataclass(kw_only=True)
class Grown(Regime):
    """Each task trains an expert of its own beside the frozen ones before it.

    Args:
        sequential: Words of the section `sequential` of a run.
    """

    kind: ClassVar[str] = "grown"

    sequential: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        build(SequentialConfig, self.sequential, "regime.sequential")

    def size(self, one: int, tasks: int) -> int:
        """That of all experts."""
        return one * tasks

    def train(self, work: Work) -> list[Stage]:
        """One training for each task, by the recipe itself."""
        from train import sequential

        words = build(SequentialConfig, self.sequential, "regime.sequential")
        adapters = sequential.train_tasks(
            work.source,
            work.make_config(),
            words,
            work.rows,
            work.folder,
            work.tokenizer,
            work.arguments,
            work.adapter_dtype,
        )
        return [Stage(task=task, adapter=adapter) for task, adapter in zip(work.rows, adapters, strict=True)]

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """The last mixture answers everything."""
        last = len(work.rows) - 1
        yield list(tasks), work.load(work.folder.stage(stage_name(last, list(work.rows)[last])))
