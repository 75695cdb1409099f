"""The pictures of a diagnosis."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval import figures

_MOMENTS = {"start": "before training", "end": "after training"}


def draw(found: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write conflict.png and transfer.png; their paths.

    Args:
        found: The diagnosis.
        folder: Where they go.
    """
    files = [folder / "conflict.png", folder / "transfer.png"]
    figures.save(_conflict(found), files[0])
    figures.save(_transfer(found), files[1])
    return files


def _conflict(found: Mapping[str, Any]) -> Any:
    """The cosines of tasks, before and after training, and their mean by layer."""
    from matplotlib.figure import Figure

    tasks = list(found["tasks"])
    size = 1.6 + 0.55 * len(tasks)
    figure = Figure(figsize=(2 * size + 4.6, size + 0.9), layout="constrained")
    axes = figure.subplots(1, 3)
    for axis, (moment, words) in zip(axes, _MOMENTS.items(), strict=False):
        overall = found["conflict"][moment]["overall"]
        values = [[overall[a][b] for b in tasks] for a in tasks]
        _matrix(axis, values, tasks, tasks, limit=1.0, colors="RdBu", form="{:.2f}")
        axis.set_title(f"Cosine of gradients, {words}", fontsize=9)
    lines = axes[2]
    for (moment, words), marker in zip(_MOMENTS.items(), "os", strict=True):
        layers = found["conflict"][moment]["layers"]
        lines.plot(range(len(layers)), list(layers.values()), marker=marker, markersize=3.5, label=words)
    lines.axhline(0, color="black", linewidth=0.8)
    lines.set_title("Mean of different tasks, by layer", fontsize=9)
    lines.set_xlabel("layer", fontsize=8)
    lines.xaxis.get_major_locator().set_params(integer=True)
    lines.tick_params(labelsize=8)
    lines.grid(alpha=0.25)
    lines.legend(fontsize=8)
    figure.supxlabel("-1: tasks pull apart, 0: nothing in common, 1: alike; diagonal: halves of one task", fontsize=8)
    return figure


def _transfer(found: Mapping[str, Any]) -> Any:
    """What each task's LoRA does to the loss on each task."""
    from matplotlib.figure import Figure

    tasks = list(found["tasks"])
    size = 1.8 + 0.6 * len(tasks)
    figure = Figure(figsize=(size + 1.6, size + 0.8), layout="constrained")
    axis = figure.subplots()
    against = found["transfer"]["against_base"]
    values = [[against[lora][task] for task in tasks] for lora in tasks]
    limit = max(abs(value) for row in values for value in row) or 1.0
    _matrix(axis, values, tasks, tasks, limit=limit, colors="RdBu_r", form="{:+.2f}")
    axis.set_ylabel("LoRA of", fontsize=8)
    axis.set_xlabel("on rows of", fontsize=8)
    axis.set_title("Loss minus the base's, nats (blue: helps)", fontsize=9)
    return figure


def _matrix(
    axis: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    limit: float,
    colors: str,
    form: str,
) -> None:
    axis.imshow(values, cmap=colors, vmin=-limit, vmax=limit)
    # a task's name is not mathematics, whatever dollars it has
    labels = {"fontsize": 8, "parse_math": False}
    axis.set_xticks(range(len(columns)), columns, rotation=30, ha="right", **labels)
    axis.set_yticks(range(len(rows)), rows, **labels)
    for i, row in enumerate(values):
        for j, value in enumerate(row):
            color = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(j, i, form.format(value), ha="center", va="center", fontsize=8, color=color)
