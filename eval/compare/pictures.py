"""The pictures of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval import figures
from eval.compare.cells import BASE
from eval.compare.summary import MethodSummary, Summary

_GREY = "#8a8a8a"
# Okabe and Ito's colours, told apart by all eyes.
_COLORS = ("#0072b2", "#56b4e9", "#e69f00", "#d55e00", "#009e73", "#cc79a7", "#7a5195", "#000000", "#b8a100")


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Write mean.png and scores.png, and seen_unseen.png if there are tasks of both kinds."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {"mean": _mean(summary), "scores": _scores(summary)}
    if summary.seen and summary.unseen:
        pictures["seen_unseen"] = _seen_unseen(summary)
    for name, figure in pictures.items():
        figures.save(figure, folder / f"{name}.png")
    return [folder / f"{name}.png" for name in pictures]


def _color(summary: Summary, method: MethodSummary) -> str:
    if method.key == BASE:
        return _GREY
    trained = [each.key for each in summary.methods if each.key != BASE]
    return _COLORS[trained.index(method.key) % len(_COLORS)]


def _dots(axis: Any, summary: Summary, labels: list[str]) -> None:
    """The mean of some tasks: a dot for each method with its error, its seeds as light dots."""
    places = range(len(summary.methods))
    for place, method in zip(places, summary.methods, strict=True):
        color = _color(summary, method)
        score = summary.score(method, labels)
        seeds = [100 * value for value in method.by_seed(labels)]
        if len(seeds) > 1:
            axis.plot(seeds, [place] * len(seeds), "o", color=color, alpha=0.3, markersize=4)
        axis.errorbar(
            100 * score.value, place, xerr=100 * score.stderr, fmt="o", color=color, markersize=5.5, capsize=2.5
        )
    axis.grid(axis="x", alpha=0.25)
    axis.tick_params(labelsize=8)
    axis.set_yticks(list(places), [method.title for method in summary.methods])


def _mean(summary: Summary) -> Any:
    """The mean of all tasks alone."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 0.9 + 0.28 * len(summary.methods)), layout="constrained")
    axis = figure.subplots()
    _dots(axis, summary, summary.labels)
    axis.invert_yaxis()
    axis.set_title(_heading(summary, f"Mean of {len(summary.labels)} tasks, ± one standard error"), fontsize=9)
    axis.set_xlabel("percent; light: single seeds", fontsize=8)
    return figure


def _scores(summary: Summary) -> Any:
    """One panel per task and one of their mean: a dot per method with its error, the floor, the seeds as light dots."""
    from matplotlib.figure import Figure

    panels: list[tuple[str, list[str]]] = [(label, [label]) for label in summary.labels]
    panels.append(("mean of tasks", summary.labels))
    columns = 3
    lines = -(-len(panels) // columns)
    height = 0.9 + 0.28 * len(summary.methods)
    figure = Figure(figsize=(11.5, lines * height + 0.6), layout="constrained")
    parts = "rows" if summary.seed_variance(summary.labels) is None else "rows and seeds"
    figure.suptitle(_heading(summary, f"Scores, ± one standard error ({parts})"), fontsize=11)
    grid = figure.subplots(lines, columns, squeeze=False, sharey=True)
    for axis in list(grid.flat)[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, labels) in zip(grid.flat, panels, strict=False):
        _dots(axis, summary, labels)
        floor = summary.methods[0].first.tasks[labels[0]].majority if len(labels) == 1 else None
        if floor is not None:
            axis.axvline(100 * floor, color="black", linestyle=":", linewidth=1)
        note = "" if len(labels) > 1 else " (seen)" if title in summary.seen else " (unseen)"
        axis.set_title(f"{title}{note}", fontsize=9)
    grid[0][0].invert_yaxis()  # shared: the base on top in every panel
    dotted = "dotted: always giving the most frequent answer; " if summary.has_floors else ""
    figure.supxlabel(f"percent; {dotted}light: single seeds", fontsize=8)
    return figure


def _seen_unseen(summary: Summary) -> Any:
    """Tasks that were trained on against those that were not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 5.6), layout="constrained")
    axis = figure.subplots()
    for method in summary.methods:
        color = _color(summary, method)
        seen, unseen = summary.score(method, summary.seen), summary.score(method, summary.unseen)
        pairs = zip(method.by_seed(summary.seen), method.by_seed(summary.unseen), strict=True)
        if len(method.seeds) > 1:
            axis.plot(*zip(*((100 * a, 100 * b) for a, b in pairs), strict=True), "o", color=color, alpha=0.3, ms=4)
        axis.errorbar(
            100 * seen.value,
            100 * unseen.value,
            xerr=100 * seen.stderr,
            yerr=100 * unseen.stderr,
            fmt="o",
            color=color,
            markersize=6,
            capsize=2.5,
            label=method.title,
        )
    axis.set_xlabel(f"mean of the seen tasks ({_names(summary.seen)})", fontsize=8)
    axis.set_ylabel(f"mean of the unseen tasks ({_names(summary.unseen)})", fontsize=8)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axis.set_title(_heading(summary, "Seen against unseen tasks"), fontsize=10)
    return figure


def _names(labels: Sequence[str]) -> str:
    return ", ".join(labels)


def _heading(summary: Summary, text: str) -> str:
    return text if not summary.missing else f"{text} (not finished: {summary.done} of {summary.total} cells)"
