"""An adapter for each task, trained on its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Work, joined
from moelora.runs.folder import STAGES


@dataclass(kw_only=True)
class Apart(Regime):
    """Each task has an adapter of its own, and whoever asks says the task: the oracle of a router by task."""

    kind: ClassVar[str] = "apart"
    is_per_task: ClassVar[bool] = True

    def parts(self, tasks: Sequence[str]) -> dict[str, list[str]]:
        """Each task alone."""
        return {task: [task] for task in tasks}

    def train(self, work: Work) -> dict[str, Path]:
        """One training for each part, none of which knows of the others."""
        for part, tasks in self.parts(list(work.rows)).items():
            work.train(f"{STAGES}/{part}", work.new_adapter, joined(work.rows, tasks))
        return {}

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """Each answers its own tasks."""
        for part, its in self.parts(tasks).items():
            yield its, work.load(self.adapters(work.folder.root, tasks)[part])

    def adapters(self, root: Path, tasks: Sequence[str]) -> dict[str, Path]:
        """Folders of the adapters by part."""
        return {part: root / STAGES / part for part in self.parts(tasks)}
