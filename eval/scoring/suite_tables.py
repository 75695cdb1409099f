"""Tables of suite scores, with everything beside a number that it takes to judge it."""

from __future__ import annotations

from collections.abc import Sequence

from eval.scoring.judging import FLOOR_NOTE, floor_cell, score_cell, verdict
from eval.scoring.model_scores import ModelScores
from eval.scoring.scores import difference, macro, percent
from moelora.errors import RunError
from moelora.runs.parameters import is_equal_size


def check_comparable(models: Sequence[ModelScores]) -> None:
    """Refuse to put scores side by side that were not measured alike.

    Raises:
        RunError: If suite, protocol, chat template, tasks, their versions, or the rows differ.
    """
    first = models[0]
    for other in models[1:]:
        differences = {
            "suite": (first.suite, other.suite),
            "protocol": (first.protocol, other.protocol),
            "chat template": (first.chat, other.chat),
            "tasks": (sorted(first.tasks), sorted(other.tasks)),
        }
        for what, (a, b) in differences.items():
            if a != b:
                raise RunError(
                    f"{first.name} and {other.name} cannot stand in one table: their {what} differ, {a!r} and {b!r}. "
                    "Score them again in the same way."
                )
        for label, task in first.tasks.items():
            o = other.tasks[label]
            if (task.rows, task.metric, task.version) != (o.rows, o.metric, o.version):
                raise RunError(
                    f"{first.name} and {other.name} cannot stand in one table: on {label} they were not asked the same "
                    f"({len(task.values)} and {len(o.values)} rows, versions {task.version} and {o.version}). Score "
                    "them again with the same --limit."
                )


def score_table(models: Sequence[ModelScores]) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one task each, their mean, then the models' sizes and speed; one column per model.

    Args:
        models: The models; with more than two, the difference of the last two, paired by rows, has a column too.

    Raises:
        RunError: If the models were not scored alike.
    """
    check_comparable(models)
    paired = len(models) > 2
    header = ["task", "metric", "n", "majority", *(model.name for model in models)]
    if paired:
        header.append(f"{models[-1].name} - {models[-2].name}")
    rows, gaps = [], []
    for label, task in models[0].tasks.items():
        cells = [label, task.metric, str(len(task.values)), floor_cell(task.majority)]
        cells += [score_cell(model.tasks[label].score, model.tasks[label].at_floor) for model in models]
        if paired:
            gaps.append(difference(models[-1].tasks[label].values, models[-2].tasks[label].values))
            cells.append(percent(gaps[-1], sign=True))
        rows.append(cells)
    empty = [""] * paired
    total = sum(len(task.values) for task in models[0].tasks.values())
    rows.append(["mean of tasks", "", str(total), "", *(percent(model.macro) for model in models)])
    rows[-1] += [percent(macro(gaps), sign=True)] if paired else []
    rows.append(["trainable parameters", "", "", "", *(f"{m.parameters['trainable']:,}" for m in models), *empty])
    rows.append(["active per token", "", "", "", *(f"{m.parameters['active']:,}" for m in models), *empty])
    rows.append(["tokens/s scored", "", "", "", *(f"{m.tokens / m.seconds:,.0f}" for m in models), *empty])
    return header, rows


def notes(models: Sequence[ModelScores]) -> list[str]:
    """What a reader of the table has to know, in sentences."""
    found = []
    if any(task.at_floor for model in models for task in model.tasks.values()):
        found.append(FLOOR_NOTE)
    routed = [model for model in models if model.kind not in ("base", "lora")]
    for model in routed:
        for size, words in (("trainable", "trainable"), ("active", "active")):
            if not any(is_equal(model, other, size) for other in models if other.kind == "lora"):
                found.append(
                    f"No LoRA of equal {words} parameters stands beside {model.name}, so that its scores say little "
                    "about the mixture: train one and add it with --beside."
                )
    if routed and len(models) > 2:
        gap = macro([difference(models[-1].tasks[t].values, models[-2].tasks[t].values) for t in models[0].tasks])
        found.append(verdict(models[-1].name, models[-2].name, gap))
    return found


def is_equal(model: ModelScores, other: ModelScores, size: str) -> bool:
    """Whether another model's trainable parameters are as many as this one's `size` ("trainable" or "active")."""
    return is_equal_size(other.parameters["trainable"], model.parameters[size])
