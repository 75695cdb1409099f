"""All tasks at once: the bound for everything that sees them apart."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from eval.compare.regimes.base import Regime, Work, joined
from moelora.runs.folder import ADAPTER


@dataclass(kw_only=True)
class Together(Regime):
    """One adapter is trained on the rows of all tasks, shuffled."""

    kind: ClassVar[str] = "together"

    def train(self, work: Work) -> dict[str, Path]:
        """One training."""
        # by name, so that the order in which tasks come changes nothing here
        work.train(ADAPTER, work.new_adapter, joined(work.rows, sorted(work.rows)))
        return {}

    def models(self, work: Work, tasks: Sequence[str]) -> Iterator[tuple[list[str], Any]]:
        """It answers everything."""
        yield list(tasks), work.load(work.folder.stage(ADAPTER))
