"""What is killed: training, saving, evaluation and the comparison, on tiny models."""

from __future__ import annotations

import copy
import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Times, and what a resumed run says of being one.
_PASSING = {"timed_steps", "resumed_from", "tokens_per_second", "finished"}
_TASKS = {"gcd": {"max_value": 30}, "letter_counting": {"min_words": 2, "max_words": 3}}


@dataclass(frozen=True)
class Scenario:
    """A program that may be killed, and resumed by running it again.

    Args:
        name: Its name.
        prepare: Fills an empty folder with what the program reads; 0 if it can.
        program: Runs the program in such a folder; its exit status.
        results: The folders, and files, in that folder that hold what the program makes.
    """

    name: str
    prepare: Callable[[Path], int]
    program: Callable[[Path], int]
    results: tuple[str, ...]

    def digest(self, place: Path) -> dict[str, str]:
        """What the program made, without times: the hash of each file, by its path."""
        files = {
            path
            for result in self.results
            for path in ([place / result] if (place / result).is_file() else (place / result).rglob("*"))
            if path.is_file()
        }
        return {str(path.relative_to(place)): _hash(path, place) for path in sorted(files) if path.suffix != ".png"}

    def leftovers(self, place: Path) -> list[str]:
        """Files and folders of names that begin with a dot: halves that nobody removed."""
        return sorted(str(path.relative_to(place)) for path in place.rglob(".*"))


def _hash(path: Path, place: Path) -> str:
    content = path.read_bytes()
    if path.suffix == ".json":
        content = json.dumps(_lasting(json.loads(content)), sort_keys=True).encode()
    # where the folder lies is no part of the result
    return hashlib.sha256(content.replace(str(place).encode(), b"PLACE")).hexdigest()


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lasting(each) for key, each in value.items() if not _is_passing(key)}
    return [_lasting(each) for each in value] if isinstance(value, list) else value


def _is_passing(key: str) -> bool:
    return key in _PASSING or key.endswith("seconds")


def _run_file(place: Path, **changes: Any) -> int:
    from tests.runs.tiny import write_run

    write_run(place, **changes)
    return 0


def _sequential(place: Path) -> int:
    from tests.runs.tiny import WORDS

    training = {**copy.deepcopy(WORDS["training"]), "max_steps": 3}
    return _run_file(
        place,
        recipe="sequential",
        adapter={"preset": "lora", "r": 2, "lora_alpha": 4, "target_modules": "all-linear"},
        sequential={"router": "centroids"},
        training=training,
    )


def _trained(place: Path) -> int:
    return _run_file(place) or _train(place)


def _train(place: Path) -> int:
    from train.__main__ import main

    return main([str(place / "run.yaml")])


def _evaluate(place: Path) -> int:
    from eval.__main__ import main

    return main([str(place / "run")])


def _comparison(place: Path) -> int:
    from tests.eval.compare.tiny import write_benchmark

    lora = {"peft": "lora", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}
    part = {**lora, "r": 2, "lora_alpha": 4}
    file = write_benchmark(
        place,
        data={"tasks": _TASKS, "rows_per_task": 8, "selection_rows": 3, "fit_rows": 3, "system": "Reply."},
        training={"per_device_train_batch_size": 4, "num_train_epochs": 1, "dataloader_pin_memory": False},
        selection={"learning_rates": [0.01]},
        evaluation={"limit": 3, "batch_size": 3},
        reference="joint",
        methods={
            "joint": {"title": "joint", "adapter": lora},
            "loras": {"title": "apart", "adapter": part, "regime": {"kind": "apart"}},
            "centroids": {"title": "centroids", "regime": {"kind": "composed", "of": "loras", "router": "centroids"}},
        },
    )
    file.write_text(file.read_text().replace("protocol: loglik\n", ""))
    return 0


def _compare(place: Path) -> int:
    from eval.compare.__main__ import main

    return main([str(place / "benchmark.yaml"), "--no-probe"])


SCENARIOS = {
    each.name: each
    for each in (
        Scenario("training", _run_file, _train, ("run/adapter", "run/config.yaml", "run/rows.json")),
        Scenario("tasks in turn", _sequential, _train, ("run/adapter", "run/stages")),
        Scenario("evaluation", _trained, _evaluate, ("run/metrics.json", "run/adapter")),
        Scenario("comparison", _comparison, _compare, ("results/cells",)),
    )
}
"""The scenarios by name."""


def copied(prepared: Path, place: Path) -> Path:
    """A fresh copy of a prepared folder at a place, with paths in its files to match."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(prepared, place)
    for file in place.rglob("*.yaml"):
        file.write_text(file.read_text().replace(str(prepared), str(place)))
    return place
