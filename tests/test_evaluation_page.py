"""The commands of docs/evaluation.md run as they stand, on a tiny run in place of the real ones."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest

import eval.lm_eval as lm_eval
from moelora_cli import main as moelora
from tests.eval.compare.tiny import write_benchmark
from tests.eval.suites.test_registry import write_task
from tests.eval.tiny_suite import write_rows
from tests.runs.tiny import write_run
from train.__main__ import main as train

PAGE = Path(__file__).parent.parent / "docs/evaluation.md"


def _commands() -> list[list[str]]:
    """Each line of the page's blocks, without its comment."""
    found = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return [words for block in found for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def _moelora(verb: str, words: list[str]) -> int:
    return moelora([verb, *words])


def _in_turn(folder: Path) -> Path:
    """A folder with rows of two tasks and a run that learnt one after the other, some rows held out."""
    folder.mkdir()
    rows = [{"prompt": f"{n} ", "completion": str(n + 1), "task": "ab"[n % 2]} for n in range(8)]
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = {"recipe": "sequential", "dataset": {"files": str(folder / "rows.jsonl"), "held_out": 0.1}}
    file = write_run(folder, **words, adapter={"preset": "lora", "r": 2}, sequential={"order": ["a", "b"]})
    assert train([str(file), "training.max_steps=1"]) == 0
    return folder


def test_the_benchmark_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapter = {"preset": "mixlora", "r": 24, "lora_alpha": 48, "num_experts": 3, "top_k": 1}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "logging_steps": 1, "dataloader_pin_memory": False}
    assert train([str(write_run(tmp_path, adapter=adapter, baseline={}, training=training))]) == 0
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    in_turn = _in_turn(tmp_path / "in_turn")
    (tmp_path / "comparison").mkdir()
    (tmp_path / "task").mkdir()
    changes: dict[str, Any] = {
        "selection": {"learning_rates": [0.01]},
        "data": {"tasks": ["arc_easy"], "rows_per_task": 8, "selection_rows": 2, "steps": 2},
        "training": {key: value for key, value in training.items() if key != "max_steps"},
    }
    in_place_of = {
        "runs/quickstart": str(tmp_path / "run"),
        "runs/one": str(tmp_path / "run"),
        "runs/other": str(tmp_path / "other"),
        "runs/mine": str(in_turn / "run"),
        "runs/seq": str(in_turn / "run"),
        "rows.jsonl": str(in_turn / "rows.jsonl"),
        "unseen.jsonl": str(in_turn / "rows.jsonl"),
        "my-mixture": f"{tmp_path / 'run' / 'adapter'} --model {tmp_path / 'model'}",
        "comparison.html": str(tmp_path / "comparison.html"),
        "my-base": str(tmp_path / "model"),
        "my-adapter": str(tmp_path / "run" / "adapter"),
        "my-lora": str(tmp_path / "run" / "baseline"),
        "configs/benchmarks/commonsense.yaml": str(write_benchmark(tmp_path / "comparison", **changes)),
        "arc_easy": str(write_task(tmp_path / "task")),
        "400": "2",
        "moelora_commonsense": "moelora_commonsense --limit 1 --device cpu --batch_size 8",
    }
    programs: dict[str, Callable[[list[str]], int | None]] = {
        "moelora eval": partial(_moelora, "eval"),
        "moelora compare": partial(_moelora, "compare"),
        "moelora report": partial(_moelora, "report"),
        "python -m eval.lm_eval": lm_eval.main,
    }
    monkeypatch.setenv("MOELORA_DATA_DIR", str(write_rows(tmp_path / "rows")))
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tmp_path / "task" / "manager.py"))
    run = []
    for command in _commands():
        length = 2 if command[0] == "moelora" else 3
        program, words = " ".join(command[:length]), command[length:]
        for name, place in in_place_of.items():
            words = [re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w./-])", lambda _: place, word) for word in words]  # noqa: B023
        words = [part for word in words for part in word.split()]
        assert not programs[program](words), command
        run.append(program)
    assert set(run) == set(programs)
    assert (tmp_path / "run" / "report.html").is_file()
    assert (tmp_path / "comparison" / "results" / "README.md").is_file()
