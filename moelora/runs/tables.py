"""Tables: aligned for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence


def terminal(header: Sequence[str], rows: Sequence[Sequence[str]], foot: int = 1) -> str:
    """Columns aligned with spaces; the last rows, `foot` of them, stand apart."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    rule = "-" * len(line(header))
    body, last = rows[: len(rows) - foot], rows[len(rows) - foot :]
    return "\n".join([line(header), rule, *map(line, body), *([rule] if last else []), *map(line, last)])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: bool = True) -> str:
    """A Markdown table.

    Args:
        header: The columns' names.
        rows: The cells.
        numbers: Whether every column but the first is right-aligned.
    """

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rule = ["---", *["---:" if numbers else "---"] * (len(header) - 1)]
    return "\n".join([line(header), line(rule), *map(line, rows)])
