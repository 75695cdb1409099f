"""tests/RELIABILITY.md: a page of sections, each written by one program with the versions and the date of its run."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from moelora.files import write_atomically

PAGE = Path(__file__).parent / "RELIABILITY.md"
_HEAD = "# Reliability\n\nWhat was tried, how many times, and what happened. Each section is written by its command.\n"


def write_section(file: Path, title: str, command: str, lines: Sequence[str]) -> None:
    """Write a section in the place of its last version, or at the end; the rest of the page is left as it is.

    Args:
        file: The page.
        title: What the section is about; it tells it from the others.
        command: What writes it.
        lines: What was found.
    """
    begin, end = f"<!-- {title} -->\n", f"<!-- end of {title} -->\n"
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    date = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}"
    made = f"`{command}`, {date}: Python {platform.python_version()}, {versions}."
    section = "\n".join([f"{begin}## {title}\n", f"{made}\n", *lines, end])
    page = file.read_text() if file.exists() else _HEAD
    if begin not in page:
        page += f"\n{begin}{end}"
    before, _, rest = page.partition(begin)
    write_atomically(file, before + section + rest.partition(end)[2])
