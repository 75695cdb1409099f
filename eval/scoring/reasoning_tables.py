"""What the results on a run's own problems say: their table, the verdict, and the scores at the floor."""

from __future__ import annotations

from eval.scoring import judging
from eval.scoring.judging import floor_cell, is_at_floor
from eval.scoring.reasoning import ReasoningResults
from eval.scoring.scores import Score, difference, macro, mean, percent


def score_rows(results: ReasoningResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one task each, then their mean; one column per model, with the floor and a paired difference.

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
        cells = [task.task, str(len(task.problems)), floor_cell(task.majority), *map(percent, scores)]
        if paired:
            gaps.append(difference(task.exact(models[-1]), task.exact(models[-2])))
            cells.append(percent(gaps[-1], sign=True))
        rows.append(cells)
    floor = sum(task.majority for task in results.tasks) / len(results.tasks)
    total = str(sum(len(task.problems) for task in results.tasks))
    last = ["mean", total, floor_cell(floor), *(percent(macro(column)) for column in columns)]
    rows.append([*last, *([percent(macro(gaps), sign=True)] if paired else [])])
    return header, rows


def verdict(results: ReasoningResults) -> str:
    """Whether the adapter and the baseline differ by more than chance, in words; empty without a baseline."""
    if len(results.models) < 3:
        return ""
    ours, theirs = results.models[-1], results.models[-2]
    gap = macro([difference(task.exact(ours), task.exact(theirs)) for task in results.tasks])
    return judging.verdict(ours, theirs, gap)


def at_floor(results: ReasoningResults) -> str:
    """Which trained models do no better on a task than always giving its most frequent answer, in words."""
    found = [
        f"{model} on {task.task}"
        for model in results.models[1:]
        for task in results.tasks
        if is_at_floor(mean(task.exact(model)).value, task.majority)
    ]
    return f"Not above the most frequent answer: {', '.join(found)}." if found else ""


def chosen_rows(results: ReasoningResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many of a task's questions went to each expert; without rows if nothing was routed so."""
    names = list(next(iter(results.chosen.values()), {}))
    return ["questions of", *names], [[task, *map(str, counts.values())] for task, counts in results.chosen.items()]
