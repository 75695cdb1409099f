"""How the command reads its words and shows its help."""

from __future__ import annotations

import argparse
import itertools
import textwrap
from collections.abc import Sequence
from typing import Any


class HelpFormatter(argparse.HelpFormatter):
    """Fills paragraphs, and leaves indented lines, such as examples, as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        filled: list[str] = []
        for is_kept, group in itertools.groupby(text.strip("\n").splitlines(), lambda line: line[:1] in ("", " ")):
            lines = list(group)
            filled += lines if is_kept else textwrap.wrap(" ".join(lines), width, break_on_hyphens=False)
        return "\n".join(filled)


class VerbParser(argparse.ArgumentParser):
    """Takes words and options in any order, as in `moelora train run.yaml --restart training.max_steps=20`."""

    def __init__(self, **words: Any) -> None:
        super().__init__(**{"formatter_class": HelpFormatter, "allow_abbrev": False, **words})
        self._is_reading = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Read words; argparse does so in any order only for a parser without commands, and calls this itself then."""
        if self._is_reading or any(isinstance(action.choices, dict) for action in self._get_positional_actions()):
            return super().parse_known_args(args, namespace)
        self._is_reading = True
        try:
            return self.parse_known_intermixed_args(args, namespace)
        finally:
            self._is_reading = False


def examples(*lines: str) -> str:
    """The end of a verb's help: commands that work, one a line."""
    return "\n".join(["Examples:", *(f"    {line}" for line in lines)])


def listed(rows: Sequence[tuple[str, str]], indent: int = 2) -> str:
    """Names and what they are, aligned, a line each."""
    width = max((len(name) for name, _ in rows), default=0) + 2
    return "\n".join(f"{' ' * indent}{name:<{width}}{what}".rstrip() for name, what in rows)
