"""One self-contained HTML page about a run: scores, training curves, heat maps of the routing, and single tokens."""

from __future__ import annotations

from pathlib import Path

from eval.page.content import read_run
from eval.page.page import render_page
from moelora.files import write_atomically

__all__ = ["build_report", "read_run", "render_page"]


def build_report(run: str | Path, output: str | Path | None = None) -> Path:
    """Write the page of a run; it needs no network to be read.

    Args:
        run: Folder of a run, or of an adapter, with what `moelora train` and `moelora eval` have left in it.
        output: The HTML file; None for `report.html` in the run's folder.

    Returns:
        The file.

    Raises:
        ReportError: If the folder holds nothing to report, or jinja2 is not installed.
    """
    run = Path(run)
    content = read_run(run)
    file = Path(output) if output is not None else run / "report.html"
    text = render_page(content)
    write_atomically(file, text)
    return file
