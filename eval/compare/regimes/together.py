"""All tasks at once: the bound for everything that sees them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Work
from moelora.runs.folder import ADAPTER


@dataclass(kw_only=True)
class Together(Regime):
    """One adapter is trained on the rows of all tasks, shuffled."""

    kind: ClassVar[str] = "together"

    def train(self, work: Work) -> dict[str, Path]:
        """One training."""
        from datasets import concatenate_datasets

        # by name, so that the order in which tasks come changes nothing here
        rows = concatenate_datasets([work.rows[task] for task in sorted(work.rows)])
        work.train(ADAPTER, work.new_adapter, rows)
        return {}

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """It answers everything."""
        yield list(tasks), work.load(work.folder.stage(ADAPTER))
