"""One self-contained HTML page about runs: scores, training curves, heat maps of the routing, and single tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.page.comparison import compare_runs
from eval.page.content import read_run
from eval.page.page import render_page
from moelora.errors import ReportError
from moelora.files import write_atomically

__all__ = ["build_report", "compare_runs", "read_run", "read_runs", "render_page"]


def build_report(runs: str | Path | Sequence[str | Path], output: str | Path | None = None) -> Path:
    """Write the page of a run, or of several beside each other; it needs no network to be read.

    Args:
        runs: Folder of a run, or of an adapter, with what `moelora train` and `moelora eval` have left in it; or
            several of them.
        output: The HTML file; None for `report.html` in the run's folder, or for several runs in the working folder.

    Returns:
        The file.

    Raises:
        ReportError: If a folder holds nothing to report or is given twice, or jinja2 is not installed.
    """
    given = [runs] if isinstance(runs, (str, Path)) else list(runs)
    found = read_runs(given)
    content = compare_runs(found) if len(found) > 1 else next(iter(found.values()))
    file = Path(output or (Path(given[0]) / "report.html" if len(given) == 1 else "report.html"))
    text = render_page(content)
    write_atomically(file, text)
    return file


def read_runs(runs: Sequence[str | Path]) -> dict[str, dict[str, Any]]:
    """What the page shows of each run, by the folder as it was given.

    Args:
        runs: At least one folder.

    Raises:
        ReportError: If a folder holds nothing to report or is given twice.
    """
    places = [Path(run).resolve() for run in runs]
    for run, place in zip(runs, places, strict=True):
        if places.count(place) > 1:
            raise ReportError(f"{str(run)!r} is given twice; allowed: each run once.")
    return {str(run): read_run(Path(run)) for run in runs}
