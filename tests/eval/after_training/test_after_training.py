"""The program on tiny adapters: every row, its report, and that a wrong result is an error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from eval.after_training.__main__ import main
from tests.runs.tiny import write_run


def words(folder: Path) -> list[str]:
    config = write_run(folder)
    return [str(config), "--work", str(folder / "work"), "--output", str(folder / "out"), "--limit", "3"]


def test_every_verb(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tmp_path)) == 0, capsys.readouterr()
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    verbs = {row["verb"].partition(",")[0] for row in results["rows"]}
    print(verbs)
    assert all(row["passed"] for row in results["rows"])
    assert results["receipt"]["config"]["limit"] == 3
