"""Tables of scores: aligned for a terminal, and in Markdown."""

from __future__ import annotations

from collections.abc import Sequence

from eval.reasoning import ReasoningResults
from eval.scores import Score, difference, macro, mean


def score_rows(results: ReasoningResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: a task each, then the mean; a column a model, with the floor and the paired difference beside.

    The difference is between the last model and the one before it, when that is not the base.
    """
    models = results.models
    paired = len(models) > 2
    header = ["task", "n", "majority", *models, *([f"{models[-1]} - {models[-2]}"] if paired else [])]
    rows = []
    columns: list[list[Score]] = [[] for _ in models]
    gaps: list[Score] = []
    for task in results.tasks:
        scores = [mean(task.exact(model)) for model in models]
        for column, score in zip(columns, scores, strict=True):
            column.append(score)
        cells = [task.task, str(len(task.problems)), f"{100 * task.majority:.1f}", *map(percent, scores)]
        if paired:
            gaps.append(difference(task.exact(models[-1]), task.exact(models[-2])))
            cells.append(percent(gaps[-1], sign=True))
        rows.append(cells)
    floor = sum(task.majority for task in results.tasks) / len(results.tasks)
    total = str(sum(len(task.problems) for task in results.tasks))
    last = ["mean", total, f"{100 * floor:.1f}", *(percent(macro(column)) for column in columns)]
    rows.append([*last, *([percent(macro(gaps), sign=True)] if paired else [])])
    return header, rows


def percent(score: Score, sign: bool = False) -> str:
    """A score with its standard error, in percent."""
    return f"{100 * score.value:{'+' if sign else ''}.1f} ± {100 * score.stderr:.1f}"


def terminal(header: Sequence[str], rows: Sequence[Sequence[str]], foot: int = 1) -> str:
    """Columns aligned with spaces; the last rows, `foot` of them, stand apart."""
    widths = [max(len(line[column]) for line in [header, *rows]) for column in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        rest = (cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True))
        return "  ".join([cells[0].ljust(widths[0]), *rest])

    rule = "-" * len(line(header))
    return "\n".join([line(header), rule, *map(line, rows[:-foot]), rule, *map(line, rows[-foot:])])


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every column but the first is right-aligned."""

    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(header), line(["---", *["---:"] * (len(header) - 1)]), *map(line, rows)])
