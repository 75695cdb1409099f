"""A mixture that gets an expert for each task, as `moelora train --recipe sequential` makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import OneAfterTheOther, Work
from moelora.runs.config import SequentialConfig
from moelora.runs.schema import build


@dataclass(kw_only=True)
class Grown(OneAfterTheOther):
    """Each task trains an expert of its own beside the frozen ones before it.

    Args:
        sequential: Words of the section `sequential` of a run.
    """

    kind: ClassVar[str] = "grown"
    is_per_task: ClassVar[bool] = True
    trains_itself: ClassVar[bool] = True

    sequential: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        build(SequentialConfig, self.sequential, "regime.sequential")

    def train(self, work: Work) -> dict[str, Path]:
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
        return dict(zip(work.rows, adapters, strict=True))
