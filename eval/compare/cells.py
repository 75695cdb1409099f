"""The cells of a comparison, and which of them are finished."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from eval.compare.measures import MEASURES
from eval.compare.schema import BenchmarkConfig
from eval.scoring.model_scores import ModelScores
from moelora.errors import RunError
from moelora.files import claimed, write_atomically
from moelora.runs.folder import HARMLESS, changes

BASE = "base"


@dataclass(frozen=True)
class Cell:
    """One thing to do, and never again.

    Args:
        kind: "base": score the base model. "select": train briefly, to choose a learning rate. "final": train, score.
        method: Key of the method; empty for the base.
        seed: Its seed.
        learning_rate: Of its training; None while it is not chosen yet.
    """

    kind: Literal["base", "select", "final"]
    method: str = ""
    seed: int = 0
    learning_rate: float | None = None

    @property
    def id(self) -> str:
        """Its name, also of its files."""
        if self.kind == "base":
            return BASE
        ending = f"lr{self.learning_rate:g}" if self.kind == "select" else f"seed{self.seed}"
        return f"{self.method}-{ending}"


def selection_cells(config: BenchmarkConfig) -> list[Cell]:
    """A trial for each method that is trained and learning rate; none where there is nothing to choose."""
    rates = config.selection.learning_rates
    return [
        Cell("select", key, config.selection.seed, rate)
        for key, method in config.methods.items()
        if method.regime.made_of is None and method.learning_rate is None and len(rates) > 1
        for rate in rates
    ]


def final_cells(config: BenchmarkConfig) -> list[Cell]:
    """A training for each method and seed: the first seeds of all methods come first."""
    most = max(len(method.seeds) for method in config.methods.values())
    return [
        Cell("final", key, method.seeds[turn])
        for turn in range(most)
        for key, method in config.methods.items()
        if turn < len(method.seeds)
    ]


def identity(config: BenchmarkConfig, cell: Cell) -> dict[str, Any]:
    """Everything in the configuration that a cell's result depends on."""
    words = dataclasses.asdict(config)
    shared = {key: words[key] for key in ("model", "dtype", "model_kwargs", "protocol")}
    # left out where they are not used, so that what was measured before there were such keys is found again
    if config.recipe != "sft":
        shared["recipe"] = config.recipe
    turns = config.evaluation.earlier_turns
    asked = {"earlier_turns": turns} if turns else {}
    scored: dict[str, Any] = {"limit": config.evaluation.limit, **asked}
    if config.has_skills:
        scored["tasks"] = {**words["data"]["tasks"], "seed": config.data.seed, "system": config.data.system}
    if cell.kind == "base":
        # problems whose prompt is trained on or chosen by are not scored
        kept_apart = {"data": {key: words["data"][key] for key in ("rows_per_task", "selection_rows")}}
        return {**shared, "evaluation": scored, **(kept_apart if config.has_skills else {})}
    method = config.methods[cell.method]
    trained = {
        **shared,
        "adapter_dtype": config.adapter_dtype,
        "data": words["data"],
        "training": {k: v for k, v in config.training.items() if f"training.{k}" not in HARMLESS},
        "adapter": method.adapter,
        "seed": cell.seed,
        "learning_rate": cell.learning_rate,
    }
    if method.regime.kind != "together":
        trained["regime"] = {"kind": method.regime.kind, **dataclasses.asdict(method.regime)}
    if method.regime.made_of is not None:
        parent = config.methods[method.regime.made_of]
        trained["made_of"] = parent.adapter
        if parent.regime.kind != "apart":
            trained["made_by"] = {"kind": parent.regime.kind, **dataclasses.asdict(parent.regime)}
    if config.has_skills and cell.kind == "select":
        return {**trained, **asked, "chosen_by": MEASURES[config.recipe].chosen_by}
    if cell.kind == "select":
        data = {key: value for key, value in words["data"].items() if key != "steps"}
        return {**trained, "data": data, "steps": config.selection.steps}
    return {**trained, "evaluation": scored}


def _comparable(identity: dict[str, Any]) -> dict[str, Any]:
    """An identity with the names of its tasks in their order.

    Results depend on both, and dotted keys show neither: a task without options has none, and keys are sorted.
    """
    data, scored = identity.get("data", {}), identity.get("evaluation", {})
    mappings = {
        "data.tasks": data.get("tasks"),
        "data.foreign": data.get("foreign"),
        "scored tasks": scored.get("tasks"),
    }
    order = {f"{key} in order": list(words) for key, words in mappings.items() if isinstance(words, dict)}
    return {**identity, **order}


class Board:
    """The files of a comparison: what is finished, and where the rest is resumed.

    A cell is finished when its JSON file in `results_dir/cells` is there; the file appears whole, as the last thing a
    cell does. What a killed run leaves in `output_dir` is resumed, or made again. Several processes may work at one
    comparison: each takes cells that no other is at.

    Args:
        config: The comparison.
    """

    def __init__(self, config: BenchmarkConfig) -> None:
        self.config = config
        self.results = Path(config.results_dir)
        self.work = Path(config.output_dir)

    def claimed(self, cell: Cell) -> AbstractContextManager[bool]:
        """Keep other runners off a cell; whether it is this process's, see `moelora.files.claimed`."""
        return claimed(self.work / "claims" / cell.id)

    def is_claimed(self, cell: Cell) -> bool:
        """Whether another process is at a cell."""
        with self.claimed(cell) as ours:
            return not ours

    def file(self, cell: Cell) -> Path:
        """The result of a cell."""
        return self.results / "cells" / f"{cell.id}.json"

    def folder(self, cell: Cell) -> Path:
        """Checkpoints and adapter of a cell; another configuration has another folder."""
        words = json.dumps(_comparable(identity(self.config, cell)), sort_keys=True)
        return self.work / "cells" / f"{cell.id}-{hashlib.sha256(words.encode()).hexdigest()[:8]}"

    def is_finished(self, cell: Cell) -> bool:
        """Whether a cell is done.

        Raises:
            RunError: If its result is there, but of another configuration.
        """
        if not self.file(cell).is_file():
            return False
        found = self._identity_of(cell)
        wanted = identity(self.config, cell)
        if cell.kind == "final" and cell.learning_rate is None:
            wanted.pop("learning_rate")
            found.pop("learning_rate", None)
        # what is written to JSON and read again
        changed = changes(_comparable(found), _comparable(json.loads(json.dumps(wanted))))
        if changed:
            raise RunError(
                f"{str(self.file(cell))!r} is the result of another configuration: {'; '.join(changed)}. Undo the "
                "change, give another results_dir, or remove the file to have the cell done again."
            )
        return True

    def _identity_of(self, cell: Cell) -> dict[str, Any]:
        content = self.read_json(cell)
        found = content.get("extra", content).get("identity")
        if not isinstance(found, dict):
            raise RunError(f"{str(self.file(cell))!r} is not the result of a comparison; move it away.")
        return found

    def read_json(self, cell: Cell) -> dict[str, Any]:
        """The content of a finished cell's file."""
        content = json.loads(self.file(cell).read_text())
        if not isinstance(content, dict):
            raise RunError(f"{str(self.file(cell))!r} is not the result of a comparison; move it away.")
        return content

    def write_selection(self, cell: Cell, content: dict[str, Any]) -> None:
        """Note the outcome of a trial."""
        words = {**content, "identity": identity(self.config, cell)}
        write_atomically(self.file(cell), json.dumps(words, indent=1) + "\n")

    def read_scores(self, cell: Cell) -> ModelScores:
        """The scores of a finished cell."""
        return ModelScores.read(self.file(cell))

    def chosen_rate(self, method: str) -> float | None:
        """The best learning rate, once all of the grid are tried: with the most right answers, or the lowest loss.

        Tasks of reasoning-gym are scored by right answers (see `eval.compare.measures`), the suite by likelihoods, and
        trials likewise. Of two rates with as many right answers the one with the lower loss is taken. A rate whose
        training came to no number is never taken.

        None stands also for a method that diverges at all of them, see `lost`.
        """
        trained = self.config.methods[method].regime.made_of or method
        if not self._trials(trained):
            return self.config.methods[trained].learning_rate or self.config.selection.learning_rates[0]
        stable = {cell: words for cell, words in self._outcomes(trained).items() if "diverged" not in words}
        if not stable:
            return None
        return min(stable, key=lambda cell: (-stable[cell].get("exact", 0.0), stable[cell]["loss"])).learning_rate

    def lost(self, method: str) -> str | None:
        """Why a method cannot be trained: it diverged at each rate of the grid; None if it did not."""
        trained = self.config.methods[method].regime.made_of or method
        reasons = [words.get("diverged") for words in self._outcomes(trained).values()]
        return reasons[0] if reasons and all(reasons) else None

    def _trials(self, trained: str) -> list[Cell]:
        return [cell for cell in selection_cells(self.config) if cell.method == trained]

    def _outcomes(self, trained: str) -> dict[Cell, dict[str, Any]]:
        """What the trials of a method came to, once all are finished; empty before."""
        trials = self._trials(trained)
        return {cell: self.read_json(cell) for cell in trials} if all(map(self.is_finished, trials)) else {}

    def cells(self) -> list[Cell]:
        """All cells in the order in which they are done, finals with their learning rates where those are chosen."""
        finals = [self.final(cell.method, cell.seed) for cell in final_cells(self.config)]
        return [Cell("base"), *selection_cells(self.config), *finals]

    def final(self, method: str, seed: int) -> Cell:
        """The training of a method and seed, with its learning rate if that is chosen."""
        return Cell("final", method, seed, self.chosen_rate(method))

    def waits_for(self, cell: Cell) -> list[Cell]:
        """Cells that have to be finished before this one can be done."""
        if cell.kind != "final":
            return []
        of = self.config.methods[cell.method].regime.made_of
        needed = [self.final(of, cell.seed)] if of is not None else []
        if cell.learning_rate is None:
            needed += self._trials(of or cell.method)
        return [each for each in needed if not self.is_finished(each)]
