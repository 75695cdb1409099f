"""One adapter, trained on the tasks one after the other."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import OneAfterTheOther, Work
from moelora.errors import RunError
from moelora.runs.folder import task_stage


@dataclass(kw_only=True)
class InTurn(OneAfterTheOther):
    """The same adapter learns one task after the other; old rows are gone, but for a share that is kept.

    Args:
        replay: Share of each earlier task's rows that is kept and trained on again with every later one.
    """

    kind: ClassVar[str] = "in_turn"

    replay: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.replay <= 1:
            raise RunError(f"replay is {self.replay}; allowed: a share, 0 to 1.")

    def train(self, work: Work) -> dict[str, Path]:
        """One training for each task, each with a schedule of its own."""
        done: dict[str, Path] = {}
        make: Callable[[], Any] = work.new_adapter
        for index, (task, rows) in enumerate(work.rows.items()):
            done[task] = work.train(task_stage(index + 1, task), make, self._with_replay(work, index, rows))
            make = partial(work.continued, done[task])
        return done

    def _with_replay(self, work: Work, index: int, rows: Any) -> Any:
        from datasets import concatenate_datasets

        kept = []
        for task in list(work.rows)[:index]:
            old = work.rows[task]
            chosen = random.Random(f"kept {work.seed} {task}").sample(range(len(old)), round(self.replay * len(old)))
            kept.append(old.select(sorted(chosen)))
        return concatenate_datasets([rows, *(each for each in kept if len(each))])
