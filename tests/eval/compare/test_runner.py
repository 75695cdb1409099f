"""Comparisons on tasks of reasoning-gym: rates that diverge, two runners, groups of tasks."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from eval.compare import __main__ as program
from eval.compare.__main__ import main
from eval.compare.cells import Board, Cell
from eval.compare.schema import load_benchmark
from eval.compare.skill_bench import SkillBench
from moelora.errors import MoeLoraError, TrainingError
from moelora.runs.folder import RunDir
from tests.eval.compare.test_skills import CHANGES, LORA, METHODS, PART, SEED, folder_of, read, write


def only_joint(folder: Path, *rates: float) -> Path:
    return write(folder, methods={"joint": METHODS["joint"]}, selection={"learning_rates": list(rates)})


def test_a_rate_that_diverges_is_noted_and_never_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train = SkillBench.train
    limit = 0.05

    def diverging(self: SkillBench, cell: Cell, folder: RunDir) -> dict[str, Any]:
        if (cell.learning_rate or 0) > limit:
            raise TrainingError("the loss is nan in step 2.")
        return train(self, cell, folder)

    monkeypatch.setattr(SkillBench, "train", diverging)
    file = only_joint(tmp_path, 0.01, 0.1)
    assert main([str(file)]) == 0
    assert read(tmp_path, "joint").extra["training"]["learning_rate"] == 0.01
    cells = tmp_path / "results" / "cells"
    trial = json.loads((cells / "joint-lr0.1.json").read_text())
    assert trial["diverged"] == "the loss is nan in step 2."
    assert "exact" not in trial
    assert "| diverged |" in (tmp_path / "results" / "README.md").read_text()

    for file_of_cell in cells.iterdir():
        file_of_cell.unlink()
    limit = 0.0
    assert main([str(file)]) == 1
    assert (
        "joint cannot be trained at any of selection.learning_rates 0.01, 0.1: the loss is" in capsys.readouterr().err
    )
    # what is there of others can be drawn
    assert main([str(file), "--render"]) == 0
    assert "| base |" in (tmp_path / "results" / "README.md").read_text()


def test_a_runner_waits_for_what_lets_more_begin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another process is at the last trial: its end chooses the rate of the training, which is left to be done."""
    file = only_joint(tmp_path, 0.01, 0.02)
    board = Board(load_benchmark(file))
    trials = {cell.learning_rate: cell for cell in board.cells() if cell.kind == "select"}
    claimed, waiting = threading.Event(), threading.Event()

    def pause(_: float) -> None:
        waiting.set()
        time.sleep(0.02)

    monkeypatch.setattr(program, "time", SimpleNamespace(monotonic=time.monotonic, sleep=pause))

    def other_process() -> None:
        with board.claimed(trials[0.02]):
            claimed.set()
            assert waiting.wait(120)
            board.write_selection(trials[0.02], {"learning_rate": 0.02, "exact": 2.0, "loss": 0.0, "seconds": 1.0})

    thread = threading.Thread(target=other_process)
    thread.start()
    assert claimed.wait(10)
    assert main([str(file)]) == 0
    thread.join()
    assert read(tmp_path, "joint").extra["training"]["learning_rate"] == 0.02
    assert capsys.readouterr().out.count("Waiting   for joint-lr0.02, which another process is at") == 1


def test_groups_of_tasks_share_an_adapter(tmp_path: Path) -> None:
    groups = {"both": ["gcd", "letter_counting"], "last": ["spell_backward"]}
    methods = {
        "joint": {"title": "joint", "adapter": LORA, "seeds": [SEED]},
        "oracle": {
            "title": "by group",
            "adapter": PART,
            "regime": {"kind": "grouped", "groups": groups},
            "seeds": [SEED],
        },
        "centroids": {
            "title": "centroids",
            "regime": {"kind": "composed", "of": "oracle", "router": "centroids"},
            "seeds": [SEED],
        },
    }
    tasks = {**CHANGES["data"]["tasks"], "spell_backward": {}}
    assert main([str(write(tmp_path, methods=methods, data={**CHANGES["data"], "tasks": tasks}))]) == 0
    root = folder_of(tmp_path, "oracle") / "stages"
    assert sorted(each.name for each in root.iterdir()) == ["both", "last"]
    oracle = read(tmp_path, "oracle")
    # twelve steps would be a LoRA for each task alone: 16 rows in batches of four, and 8
    assert oracle.extra["training"]["steps"] == 6
    assert oracle.parameters["trainable"] == read(tmp_path, "joint").parameters["trainable"]
    assert set(read(tmp_path, "centroids").extra["chosen"]["own"]) == set(tasks)
    words = json.loads((folder_of(tmp_path, "centroids") / "adapter" / "adapter_config.json").read_text())
    assert words["experts"]["names"] == ["both", "last"]
    regrouped = "methods.oracle.regime.groups={both: [gcd], last: [letter_counting, spell_backward]}"
    board = Board(load_benchmark(tmp_path / "benchmark.yaml", [regrouped]))
    for key, word in (("oracle", "regime.groups"), ("centroids", "made_by.groups")):
        with pytest.raises(MoeLoraError, match=word):
            board.is_finished(board.final(key, SEED))


@pytest.mark.parametrize(
    "groups", [{"a": ["gcd"]}, {"a": ["gcd", "letter_counting"], "b": ["gcd"]}, {"a": ["x", "gcd"]}]
)
def test_groups_that_are_no_partition(tmp_path: Path, groups: dict[str, list[str]]) -> None:
    methods = {
        "joint": {"title": "joint", "adapter": LORA},
        "oracle": {"title": "by group", "adapter": LORA, "regime": {"kind": "grouped", "groups": groups}},
    }
    with pytest.raises(MoeLoraError, match="exactly one group"):
        load_benchmark(write(tmp_path, methods=methods))
