"""What a sequential run keeps of its earlier tasks: the score of each task after each stage."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from eval.page.matrix import Json, matrix
from moelora.runs.folder import STAGES, read_task_stage

_METRIC = "exact"


def read_forgetting(run: Path, own: Json, read: Callable[[Path], Json]) -> tuple[list[Json], list[str]]:
    """Tables and series of the adapter and, where its stages are scored, of the baseline; and what is in the way.

    The scores are those that `moelora eval RUN --stages` leaves beside the stages. The last stage is the finished
    adapter, so that the scores of the run itself do for it.

    Args:
        run: Folder of the run.
        own: The run's own metrics.json; empty if there is none.
        read: Reads a JSON file, and gives an empty mapping for none.

    Returns:
        One table with its series for each model, and notes on what cannot be shown: stages that are not scored, or that
        were scored on different problems, which cannot be compared.
    """
    stages: dict[str, dict[int, tuple[str, Json]]] = {}
    for folder in sorted((run / STAGES).glob("*")):
        if found := read_task_stage(folder.name):
            role, number, task = found
            stages.setdefault(role, {})[number] = task, read(folder / "metrics.json")
    shown, notes = [], []
    for role, of_role in sorted(stages.items()):
        table = _of_role(role, of_role, own)
        if isinstance(table, str):
            notes.append(f"No picture of what is forgotten, {role}: {table}")
        elif table is not None:
            shown.append(table)
    if any(row["metric"] == "loss" for row in own.get("scores", [])):
        notes.append("No picture of what is forgotten: the rows are texts, which have no exact answers.")
    elif len(stages.get("adapter", {})) > 1 and not shown and not notes:
        notes.append(f"No scores by stage, which show what is forgotten: `moelora eval {run} --stages` makes them.")
    return shown, notes


def _of_role(role: str, stages: Mapping[int, tuple[str, Json]], own: Json) -> Json | str | None:
    """The table of one model; None if fewer than two of its stages are scored, or why they cannot be compared."""
    order = sorted(stages)
    learnt = [stages[number][0] for number in order]
    scored = {number: (stages[number][1], "adapter") for number in order if stages[number][1]}
    if own and order[-1] not in scored:
        scored[order[-1]] = own, role
    scores = {number: _scores(content, of) for number, (content, of) in sorted(scored.items())}
    scores = {number: values for number, values in scores.items() if values}
    if len(scores) < 2:
        return None
    problems = [scored[number][0].get("tasks") for number in scores]
    if any(each != problems[0] for each in problems):
        return (
            "its stages were scored on different problems, which cannot be compared; score each stage and the run "
            "again with the same --limit."
        )
    first = next(iter(scores))
    tasks = [task for task in learnt if task in scores[first]]
    base = _scores(scored[first][0], "base")
    rows: dict[str, list[tuple[str, float]]] = {}
    if base:
        rows["base model"] = [_cell(base.get(task)) for task in tasks]
    for number, values in scores.items():
        rows[f"after {number}: {stages[number][0]}"] = [_cell(values.get(task)) for task in tasks]
    if order[-1] in scores:
        rows["forgotten"] = [_lost(scores, order, learnt, task) for task in tasks]
    return {
        "role": role,
        "matrix": matrix(
            f"Score of each task after each stage, {role}.",
            "Exact answers in percent. Forgotten: the best score after an earlier stage, from the task's own on, minus "
            "the score after the last stage.",
            tasks,
            rows,
            1.0,
        ),
        "curve": {
            "title": f"score by stage, {role}",
            "note": "exact answers, share of the problems",
            "unit": "stage",
            "series": [
                {"name": task, "points": [[number, values[task]] for number, values in scores.items()]}
                for task in tasks
            ],
        },
    }


def _scores(content: Json, role: str) -> dict[str, float]:
    """The scores, by task, of the model that has a role in an evaluation of a run's own tasks."""
    names = [name for name, model in (content.get("models") or {}).items() if model.get("role") == role]
    tasks = content.get("tasks") or {}
    return {
        row["task"]: row["value"]
        for row in content.get("scores", [])
        if row["metric"] == _METRIC and row["task"] in tasks and row["model"] in names
    }


def _cell(value: float | None) -> tuple[str, float]:
    return ("", 0.0) if value is None else (f"{100 * value:.1f}", value)


def _lost(
    scores: Mapping[int, Mapping[str, float]], order: list[int], learnt: list[str], task: str
) -> tuple[str, float]:
    """What is lost of a task; the last one has no earlier stage to lose from."""
    before = [number for number in scores if order[learnt.index(task)] <= number < order[-1]]
    if not before:
        return "", 0.0
    lost = max(scores[number][task] for number in before) - scores[order[-1]][task]
    return f"{100 * lost:+.1f}", -lost
