"""An adapter for each task, trained on its rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Work
from moelora.runs.folder import STAGES


@dataclass(kw_only=True)
class Apart(Regime):
    """Each task has an adapter of its own, and whoever asks says the task: the oracle of a router by task."""

    kind: ClassVar[str] = "apart"
    is_per_task: ClassVar[bool] = True

    def train(self, work: Work) -> dict[str, Path]:
        """One training for each task, none of which knows of the others."""
        for task, rows in work.rows.items():
            work.train(f"{STAGES}/{task}", work.new_adapter, rows)
        return {}

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """Each answers its own task."""
        for task, folder in adapters(work.folder.root, tasks).items():
            yield [task], work.load(folder)


def adapters(root: Path, tasks: Sequence[str]) -> dict[str, Path]:
    """Folders of the adapters by task."""
    return {task: root / STAGES / task for task in tasks}
