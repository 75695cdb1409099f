"""An adapter for each group of tasks, trained on the rows of the group."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from eval.compare.regimes.apart import Apart


@dataclass(kw_only=True)
class Grouped(Apart):
    """Tasks of a group share an adapter, and whoever asks says the group: the oracle of a router by group.

    Args:
        groups: The tasks by group; each task is in exactly one.
    """

    kind: ClassVar[str] = "grouped"

    groups: dict[str, list[str]]

    def parts(self, tasks: Sequence[str]) -> dict[str, list[str]]:
        """The given groups."""
        return self.groups

    def size(self, one: int, tasks: int) -> int:
        """Trainable parameters of all groups."""
        return one * len(self.groups)
