"""One adapter, trained on the tasks one after the other."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Stage, Work
from moelora.errors import RunError
from moelora.runs.folder import STAGES


def stage_name(index: int, task: str) -> str:
    """Folder of the adapter after a task."""
    return f"{STAGES}/{index + 1}-{task}"


@dataclass(kw_only=True)
class InTurn(Regime):
    """The same adapter learns one task after the other; old rows are gone, but for a share that is kept.

    Args:
        replay: Share of each earlier task's rows that is kept and trained on again with every later one.
    """

    kind: ClassVar[str] = "in_turn"

    replay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.replay <= 1:
            raise RunError(f"replay is {self.replay}; allowed: a share, 0 to 1.")

    def train(self, work: Work) -> list[Stage]:
        """One training for each task, each with a schedule of its own."""
        stages: list[Stage] = []
        for index, (task, rows) in enumerate(work.rows.items()):
            make = partial(work.continued, stages[-1].adapter) if stages else work.new_adapter
            name = stage_name(index, task)
            stages.append(Stage(task=task, adapter=work.train(name, make, self._with_replay(work, index, rows))))
        return stages

    def _with_replay(self, work: Work, index: int, rows: Any) -> Any:
        from datasets import concatenate_datasets

        kept = []
        for task in list(work.rows)[:index]:
            old = work.rows[task]
            chosen = random.Random(f"kept {work.seed} {task}").sample(range(len(old)), round(self.replay * len(old)))
            kept.append(old.select(sorted(chosen)))
        return concatenate_datasets([rows, *(each for each in kept if len(each))])

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """The last adapter answers everything."""
        last = len(work.rows) - 1
        yield list(tasks), work.load(work.folder.stage(stage_name(last, list(work.rows)[last])))
