"""`moelora compare` as a whole: what is finished is never done again, whatever happens in between."""

from __future__ import annotations

import contextlib
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.compare.__main__ import main
from eval.compare.work import Bench
from eval.scoring.model_scores import ModelScores
from tests import forked
from tests.eval.compare.tiny import WORDS, write_benchmark
from tests.eval.tiny_suite import write_rows


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that ran to its end, stopped once in between."""
    folder = tmp_path_factory.mktemp("comparison")
    file = write_benchmark(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELORA_DATA_DIR", str(write_rows(folder / "rows")))
        original = Bench.do

        def stop(bench: Bench, cell: Any) -> None:
            if cell.id == "mixlora-seed0":
                raise KeyboardInterrupt
            original(bench, cell)

        patch.setattr(Bench, "do", stop)
        shown = io.StringIO()
        with contextlib.redirect_stdout(shown):
            assert main([str(file), "--no-probe"]) == 130
        (folder / "shown.txt").write_text(shown.getvalue())
        partial = (folder / "results" / "README.md").read_text()
        (folder / "partial.md").write_text(partial)
        patch.setattr(Bench, "do", original)
        before = {path: path.stat().st_mtime_ns for path in (folder / "results" / "cells").iterdir()}
        assert len(before) == 6
        assert main([str(file), "--no-probe"]) == 0
        assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder


@pytest.fixture
def again(finished: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The YAML of that comparison, to be run again."""
    monkeypatch.setenv("MOELORA_DATA_DIR", str(finished / "rows"))
    return finished / "benchmark.yaml"


def test_what_is_left_is_said_after_each_cell(finished: Path) -> None:
    shown = (finished / "shown.txt").read_text()
    left = re.findall(r"^Finished .*\n(?:.*\n)*?Left +(\d+) cells?, (.+)$", shown, flags=re.MULTILINE)
    assert [int(count) for count, _ in left] == [7, 6, 5, 4, 3, 2]
    assert left[-1][1] == "about 1 min"
    assert shown.count("\nLeft ") == 7, "once before the first"


def test_every_cell_leaves_a_result_with_its_receipt(finished: Path) -> None:
    cells = finished / "results" / "cells"
    assert {path.stem for path in cells.iterdir()} == {
        "base",
        "lora-lr0.01",
        "lora-lr0.001",
        "mixlora-lr0.01",
        "mixlora-lr0.001",
        "lora-seed0",
        "lora-seed1",
        "mixlora-seed0",
    }
    trial = json.loads((cells / "lora-lr0.01.json").read_text())
    assert trial["losses"].keys() == {"arc_easy", "boolq", "winogrande"}
    assert trial["loss"] == pytest.approx(sum(trial["losses"].values()) / 3)
    assert trial["receipt"]["command"]
    assert trial["receipt"]["git"]["commit"]
    assert trial["receipt"]["packages"]["torch"]
    assert trial["receipt"]["seeds"]["training"] == trial["identity"]["seed"]
    chosen = {
        method: min(
            (0.01, 0.001), key=lambda rate: json.loads((cells / f"{method}-lr{rate:g}.json").read_text())["loss"]
        )
        for method in ("lora", "mixlora")
    }
    hashes = {}
    for name in ("lora-seed0", "lora-seed1", "mixlora-seed0"):
        scores = ModelScores.read(cells / f"{name}.json")
        training = scores.extra["training"]
        assert training["learning_rate"] == chosen[name.partition("-")[0]]
        assert training["steps"] == 4
        assert scores.receipt["seeds"]["training"] == int(name[-1])
        assert scores.receipt["command"].startswith("moelora compare ")
        hashes[name] = training["rows_sha256"]
    assert hashes["lora-seed0"] == hashes["mixlora-seed0"] != hashes["lora-seed1"]
    routing = ModelScores.read(cells / "mixlora-seed0.json").extra["routing"]
    assert routing["experts"] == 3
    assert 0 <= routing["entropy"]["mean"] <= 1
    assert ModelScores.read(cells / "lora-seed0.json").extra["routing"] is None
    # trials leave no weights behind, trained cells no checkpoints
    assert sorted(path.name.rpartition("-")[0] for path in (finished / "work" / "cells").iterdir()) == [
        "lora-seed0",
        "lora-seed1",
        "mixlora-seed0",
    ]
    assert not list((finished / "work").rglob("checkpoint-*"))


def test_the_table_says_what_is_there_and_what_is_missing(finished: Path) -> None:
    partial = (finished / "partial.md").read_text()
    assert "**Not finished: 6 of 8 cells.** Still to do: mixlora-seed0, lora-seed1." in partial
    assert "| LoRA (1 of 2 seeds) |" in partial
    assert "| MixLoRA" not in partial.split("## Choice")[0]
    whole = (finished / "results" / "README.md").read_text()
    assert "Not finished" not in whole
    for text in ("| LoRA | 2 |", "| MixLoRA | 1 |", "## Routing", "scores.png", "seen_unseen.png", "from seed to seed"):
        assert text in whole
    assert whole.count("**") == 4  # the chosen learning rate of each method
    for name in ("mean.png", "scores.png", "seen_unseen.png"):
        with Image.open(finished / "results" / name) as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 30
    summary = json.loads((finished / "results" / "summary.json").read_text())
    assert summary["finished"] == {"cells": 8, "of": 8, "missing": []}
    assert summary["methods"]["lora"]["seeds"] == [0, 1]
    assert summary["methods"]["mixlora"]["difference"]["n"] == 24


def test_a_finished_comparison_does_nothing(
    finished: Path, again: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Bench, "do", lambda *_: pytest.fail("a finished cell was done again"))
    assert main([str(again)]) == 0
    assert "Done      8 of 8" in capsys.readouterr().out
    assert main([str(again), "--plan"]) == 0
    assert "Left" not in capsys.readouterr().out
    assert main([str(again), "--render", "--json"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["methods"].keys() == {"base", "lora", "mixlora"}
    assert "Table     " in shown.err
    assert main([str(again), "--plan", "--json"]) == 1
    assert "--plan scores nothing; leave one of them out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("only", "expected"),
    [
        (["base"], {"base"}),
        (["*-lr"], {"lora-lr0.01", "lora-lr0.001", "mixlora-lr0.01", "mixlora-lr0.001"}),
        (["lora-lr0.01", "mixlora-lr"], {"lora-lr0.01", "mixlora-lr0.01", "mixlora-lr0.001"}),
    ],
)
def test_only_some_cells(
    again: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    only: list[str],
    expected: set[str],
) -> None:
    done: set[str] = set()
    monkeypatch.setattr(Bench, "do", lambda _, cell: done.add(cell.id))
    elsewhere = [f"output_dir={tmp_path / 'work'}", f"results_dir={tmp_path / 'results'}"]
    wanted = [word for name in only for word in ("--only", name)]
    assert main([str(again), *elsewhere, "--no-probe", *wanted]) == 0
    assert done == expected
    assert main([str(again), *elsewhere, "--render"]) == 1
    assert "nothing is scored yet" in capsys.readouterr().err


def test_a_new_method_is_added_to_what_is_there(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    added = "methods.second={title: Second, adapter: {peft: lora, r: 49}, seeds: [3]}"
    assert main([str(again), "--plan", added]) == 0
    shown = capsys.readouterr().out
    assert "Done      8 of 11" in shown
    assert "second: lr0.01, lr0.001, seed3" in shown


def test_learning_rates_that_are_given_are_not_tried(
    again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [f"methods.{method}.learning_rate=0.01" for method in ("lora", "mixlora")]
    assert main([str(again), "--plan", f"results_dir={tmp_path}", *given]) == 0
    assert "4 cells: the base model scored; learning rates are given; 3 trainings of 4 steps, scored" in " ".join(
        capsys.readouterr().out.split()
    )


def test_results_of_another_configuration_are_in_the_way(again: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(again), "--plan", "data.steps=5"]) == 1
    assert "is the result of another configuration: data.steps: 4 -> 5" in capsys.readouterr().err


def test_methods_of_one_seed_on_other_rows_never_share_a_table(
    finished: Path, again: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = finished / "results" / "cells" / "mixlora-seed0.json"
    before = file.read_text()
    content = json.loads(before)
    content["extra"]["training"]["rows_sha256"] = "other"
    file.write_text(json.dumps(content))
    try:
        assert main([str(again), "--render"]) == 1
    finally:
        file.write_text(before)
    assert "were not trained on the same rows in the same order" in capsys.readouterr().err


def test_two_runners_do_not_meet(again: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from eval.compare.cells import Board, Cell
    from eval.compare.schema import load_benchmark

    elsewhere = [f"output_dir={tmp_path / 'work'}", f"results_dir={tmp_path / 'results'}"]
    with Board(load_benchmark(again, elsewhere)).claimed(Cell("base")) as ours:
        assert ours
        assert main([str(again), *elsewhere, "--no-probe", "--only", "base"]) == 0
    shown = capsys.readouterr().out
    assert "base still under way in another process" in shown
    assert not (tmp_path / "results" / "cells").exists()


def test_kill_minus_nine_at_any_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A comparison killed at a checkpoint and again before the scores ends as one that was left alone."""
    monkeypatch.setenv("MOELORA_DATA_DIR", str(write_rows(tmp_path / "rows")))
    adapter = {"preset": "mixlora", "r": 4, "num_experts": 3, "top_k": 1}
    changes: dict[str, Any] = {
        "selection": {"learning_rates": [0.01]},
        "methods": {"mixlora": {"title": "M", "adapter": adapter}},
        # long enough for the first kill to come before the end
        "data": {**WORDS["data"], "steps": 14},
    }
    results = []
    for name, moments in (
        ("killed", ("checkpoints/adapter/checkpoint-2/trainer_state.json", "adapter")),
        ("quiet", ()),
    ):
        (tmp_path / name).mkdir()
        file = write_benchmark(tmp_path / name, **changes)
        for moment in moments:
            _kill_at([str(file), "--no-probe"], tmp_path / name, f"work/cells/*/{moment}")
        assert main([str(file), "--no-probe"]) == 0
        results.append(ModelScores.read(tmp_path / name / "results" / "cells" / "mixlora-seed0.json"))
    killed, quiet = results
    assert killed.tasks == quiet.tasks
    assert killed.extra["training"]["resumed_from"] is not None
    assert killed.extra["training"]["timed_steps"] < 14
    losses = [[entry["loss"] for entry in each.extra["training"]["log"]] for each in results]
    assert losses[0] == losses[1]


def _is_whole(path: Path) -> bool:
    """Whether a JSON file is written to its end; the comparison rightly ignores a checkpoint that is not."""
    if path.suffix != ".json":
        return True
    try:
        json.loads(path.read_text())
    except ValueError:
        return False
    return True


def _kill_at(words: list[str], folder: Path, pattern: str) -> None:
    """Start the program and kill it as soon as a file or folder is there, a JSON file with all of its content."""
    process = forked.start("eval.compare", *words)
    while not any(map(_is_whole, folder.glob(pattern))):
        assert process.is_alive(), f"it ended before {pattern}"
        time.sleep(0.01)
    process.kill()
    process.join()
