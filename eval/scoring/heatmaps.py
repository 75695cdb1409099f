"""Pictures of which experts the questions of each task go to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval import figures
from eval.scoring.generation import RoutingCounts


@dataclass(frozen=True)
class RoutingMap:
    """Load by task and router.

    Args:
        tasks: Names of the tasks.
        layers: Names of the routed modules, in the model's order.
        loads: [tasks, layers, experts], each row of experts sums to 1.
        noise: [tasks], mean distance between the two halves of a task's own questions.
        tokens: [tasks], number of tokens counted.
    """

    tasks: list[str]
    layers: list[str]
    loads: np.ndarray
    noise: np.ndarray
    tokens: list[int]

    @classmethod
    def of(cls, routing: Mapping[str, Sequence[RoutingCounts]]) -> RoutingMap:
        """From what was counted while the questions were answered."""
        tasks = list(routing)
        layers = sorted(routing[tasks[0]][0].counts, key=_order)

        def loads(parts: Sequence[RoutingCounts]) -> np.ndarray:
            total = [sum(part.counts[layer].double() for part in parts).numpy() for layer in layers]  # type: ignore[union-attr]
            return np.stack([counts_E / counts_E.sum() for counts_E in total])

        return cls(
            tasks=tasks,
            layers=layers,
            loads=np.stack([loads(routing[task]) for task in tasks]),
            noise=np.array([_distance(*(loads([half]) for half in routing[task])) for task in tasks]),
            tokens=[sum(half.tokens for half in routing[task]) for task in tasks],
        )

    def to_json(self) -> dict[str, Any]:
        """Tokens by task, the layers, and the load by task, layer and expert."""
        return {
            "tasks": dict(zip(self.tasks, self.tokens, strict=True)),
            "layers": self.layers,
            "load": {task: loads.round(4).tolist() for task, loads in zip(self.tasks, self.loads, strict=True)},
        }

    def distances(self) -> np.ndarray:
        """[tasks, tasks]: share of choices that would have to move to turn one task's load into another's.

        The mean over the layers of half the sum of absolute differences; 0 is the same routing, 1 is disjoint experts.
        """
        return np.array([[_distance(a, b) for b in self.loads] for a in self.loads])


def _distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(0.5 * np.abs(a - b).sum(-1).mean())


def _order(name: str) -> tuple[tuple[int, str], ...]:
    """Sorts "layers.2" before "layers.10"."""
    return tuple((int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name))


def _panels(layers: Sequence[str]) -> dict[str, list[int]]:
    """Routers by the kind of module they sit on: one panel for "mlp", seven for the linears of a decoder layer."""
    panels: dict[str, list[int]] = {}
    for index, layer in enumerate(layers):
        panels.setdefault(re.split(r"\.\d+\.", layer)[-1], []).append(index)
    return panels


def draw(routing: RoutingMap, adapter: str, folder: Path) -> list[Path]:
    """Write one picture per task, and one of all tasks.

    Each has the load on a scale shared by all tasks, and its difference from the mean of the tasks, which is where
    tasks are told apart.

    Args:
        routing: The load.
        adapter: Name of the adapter for the titles.
        folder: Where the PNG files go.

    Returns:
        The files: the overview first; none, with a line that says so, where matplotlib is not installed.
    """
    if not figures.are_possible():
        print("No pictures of the routing: matplotlib is not installed (pip install matplotlib).", flush=True)
        return []
    folder.mkdir(parents=True, exist_ok=True)
    overview = folder / "overview.png"
    _overview(routing, adapter, overview)
    files = [overview]
    for index, task in enumerate(routing.tasks):
        files.append(folder / f"{task}.png")
        _task(routing, index, adapter, files[-1])
    return files


def _scales(routing: RoutingMap) -> tuple[float, np.ndarray, float]:
    """Top of the load's scale, the differences, and the top of theirs: the same in every picture."""
    differences = routing.loads - routing.loads.mean(0)
    # the last percent of cells may saturate, or a single busy expert would leave the rest in one shade
    top = max(float(np.quantile(routing.loads, 0.99)), 2 / routing.loads.shape[-1])
    spread = max(float(np.quantile(np.abs(differences), 0.99)), 1e-3)
    return top, differences, spread


def _subtitle(routing: RoutingMap, index: int) -> str:
    return f"{routing.tokens[index]:,} question tokens"


def _task(routing: RoutingMap, index: int, adapter: str, file: Path) -> None:
    from matplotlib.figure import Figure

    top, differences, spread = _scales(routing)
    panels = _panels(routing.layers)
    figure = Figure(figsize=(2.2 + 3.2 * max(2, len(panels)), 6.4 if len(panels) == 1 else 11), layout="constrained")
    grid = figure.subplots(1, 2, squeeze=False) if len(panels) == 1 else figure.subplots(2, len(panels), squeeze=False)
    axes = grid.reshape(2, len(panels))
    figure.suptitle(f"{adapter} on {routing.tasks[index]}: load of each expert over {_subtitle(routing, index)}")
    for column, (kind, rows) in enumerate(panels.items()):
        load = _cells(axes[0][column], routing.loads[index][rows], "viridis", 0, top, f"{kind}: share of the choices")
        gap = _cells(
            axes[1][column], differences[index][rows], "RdBu_r", -spread, spread, f"{kind}: minus the mean task"
        )
    figure.colorbar(load, ax=list(axes[0]), format=_percent, extend="max", label=_uniform(routing))
    figure.colorbar(
        gap, ax=list(axes[1]), format=_points, extend="both", label="percentage points more than over all tasks"
    )
    figures.save(figure, file)


def _overview(routing: RoutingMap, adapter: str, file: Path) -> None:
    from matplotlib.figure import Figure

    top, differences, spread = _scales(routing)
    columns = len(routing.tasks)
    figure = Figure(figsize=(1.8 + 2.3 * columns, 8.4), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False, sharex=True, sharey=True)
    figure.suptitle(f"{adapter}: load of each expert, by task")
    for column, task in enumerate(routing.tasks):
        title = f"{task}\n{_subtitle(routing, column)}"
        load = _cells(axes[0][column], routing.loads[column], "viridis", 0, top, title, outer=column == 0)
        gap = _cells(
            axes[1][column], differences[column], "RdBu_r", -spread, spread, "minus the mean task", outer=column == 0
        )
    figure.colorbar(load, ax=list(axes[0]), format=_percent, extend="max", label=_uniform(routing))
    figure.colorbar(gap, ax=list(axes[1]), format=_points, extend="both", label="percentage points")
    figures.save(figure, file)


def _cells(axis: Any, values: np.ndarray, colors: str, low: float, high: float, title: str, outer: bool = True) -> Any:
    """One panel: routers from the first layer down, experts from left to right."""
    layers, experts = values.shape
    image = axis.imshow(values, cmap=colors, vmin=low, vmax=high, aspect="auto", interpolation="nearest")
    axis.set_title(title, fontsize=9)
    axis.set_xlabel("expert", fontsize=8)
    if outer:
        axis.set_ylabel("layer", fontsize=8)
    step = max(1, experts // 8)
    axis.set_xticks(range(0, experts, step))
    axis.set_yticks(range(0, layers, max(1, layers // 10)))
    axis.tick_params(labelsize=7)
    return image


def _percent(value: float, _: Any = None) -> str:
    return f"{value:.0%}"


def _points(value: float, _: Any = None) -> str:
    return f"{100 * value:+.0f}" if round(100 * value) else "0"


def _uniform(routing: RoutingMap) -> str:
    return f"share of the choices ({1 / routing.loads.shape[-1]:.1%} if all experts were used alike)"
