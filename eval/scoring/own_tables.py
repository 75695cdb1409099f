"""What the results on a run's own problems say: their table, the verdict, and the scores at the floor."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from eval.scoring import judging
from eval.scoring.judging import floor_cell, is_at_floor
from eval.scoring.own_tasks import OwnResults
from eval.scoring.scores import Score, difference, macro, mean, percent

WITHOUT_ANSWERS = "The rows are texts without a prompt, so that nothing is asked and there are no exact answers."


def score_rows(results: OwnResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one task each, then their mean; one column per model, with the floor and a paired difference.

    The difference is between the last model and the one before it, when that is not the base. Of rows with answers.
    """
    values = [{model: task.exact(model) for model in results.models} for task in results.tasks]
    header, rows = _table(results, values, percent)
    floors = [task.majority for task in results.tasks if task.majority is not None]
    floors.append(sum(floors) / len(floors))
    return [*header[:2], "majority", *header[2:]], [
        [*row[:2], floor_cell(floor), *row[2:]] for row, floor in zip(rows, floors, strict=True)
    ]


def loss_rows(results: OwnResults) -> tuple[list[str], list[list[str]]]:
    """As `score_rows`, of the loss of the rows' answers, or of texts."""
    return _table(results, [task.losses for task in results.tasks], nats)


def loss_title(results: OwnResults) -> str:
    """What the losses are of."""
    whose = "an answer" if results.has_answers else "a text"
    return f"Loss of {whose}'s token in nats, ± standard error; less is better"


def _table(
    results: OwnResults, values: Sequence[Mapping[str, Sequence[float]]], show: Callable[..., str]
) -> tuple[list[str], list[list[str]]]:
    models = results.models
    paired = len(models) > 2
    header = ["task", "n", *models, *([f"{models[-1]} - {models[-2]}"] if paired else [])]
    columns = [[mean(of_task[model]) for of_task in values] for model in models]
    gaps = [difference(of_task[models[-1]], of_task[models[-2]]) for of_task in values] if paired else []
    rows = []
    for number, task in enumerate(results.tasks):
        cells = [task.task, str(len(task.problems)), *(show(column[number]) for column in columns)]
        rows.append([*cells, *([show(gaps[number], sign=True)] if paired else [])])
    total = str(sum(len(task.problems) for task in results.tasks))
    last = ["mean", total, *(show(macro(column)) for column in columns)]
    return header, [*rows, [*last, *([show(macro(gaps), sign=True)] if paired else [])]]


def _too_few(results: OwnResults) -> str:
    """The first task with one problem alone, whose mean has no standard error."""
    return next((task.task for task in results.tasks if len(task.problems) < 2), "")


def nats(score: Score, sign: bool = False) -> str:
    """A loss with its standard error."""
    return f"{score.value:{'+' if sign else ''}.3f} ± {score.stderr:.3f}"


def notes(results: OwnResults) -> list[str]:
    """What the tables say, in words."""
    found = [verdict(results) if results.has_answers else WITHOUT_ANSWERS, loss_verdict(results), at_floor(results)]
    return [note for note in found if note]


def loss_verdict(results: OwnResults) -> str:
    """Whether the losses of the adapter and the baseline differ by more than chance, in words; empty without both."""
    if len(results.models) < 3 or not results.has_losses:
        return ""
    if few := _too_few(results):
        # where there are answers, the verdict on them has said so
        return "" if results.has_answers else f"No difference can be told: one text alone of {few}."
    ours, theirs = results.models[-1], results.models[-2]
    gap = macro([difference(task.losses[ours], task.losses[theirs]) for task in results.tasks])
    said = f"Loss, {ours} against {theirs}: {nats(gap, sign=True)} nats"
    if not judging.is_shown(gap):
        return f"{said}; {judging.NOT_SHOWN}"
    return f"{said}; that of {ours if gap.value < 0 else theirs} is lower."


def verdict(results: OwnResults) -> str:
    """Whether the adapter and the baseline differ by more than chance, in words; empty without a baseline."""
    if len(results.models) < 3:
        return ""
    if few := _too_few(results):
        return f"No difference can be told: one problem alone of {few}, and a standard error needs two."
    ours, theirs = results.models[-1], results.models[-2]
    gap = macro([difference(task.exact(ours), task.exact(theirs)) for task in results.tasks])
    return judging.verdict(ours, theirs, gap)


def at_floor(results: OwnResults) -> str:
    """Which trained models do no better on a task than always giving its most frequent answer, in words."""
    found = [
        f"{model} on {task.task}"
        for model in results.models[1:]
        for task in results.tasks
        if task.majority is not None
        if is_at_floor(mean(task.exact(model)).value, task.majority)
    ]
    return f"Not above the most frequent answer: {', '.join(found)}." if found else ""


def chosen_rows(results: OwnResults) -> tuple[list[str], list[list[str]]]:
    """Header and rows: how many of a task's questions went to each expert; without rows if nothing was routed so."""
    names = list(next(iter(results.chosen.values()), {}))
    return ["questions of", *names], [[task, *map(str, counts.values())] for task, counts in results.chosen.items()]
