from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest

from eval.suites.rows import load
from moelora.errors import RunError
from tests.eval.tiny_suite import write_rows


def test_local_rows_have_the_splits_that_are_there(commonsense: Path) -> None:
    rows = load(folder="arc_easy", path="allenai/ai2_arc", name="ARC-Easy")
    assert {split: len(rows[split]) for split in rows} == {"train": 24, "validation": 6, "test": 6}
    assert list(load(folder="piqa", path="baber/piqa")) == ["validation"]
    assert rows["test"][1]["choices"]["label"] == ["A", "B", "C", "D"]
    assert rows["train"][1]["choices"]["label"] == ["1", "2", "3", "4"]


def test_boolqs_passages_lose_their_titles(commonsense: Path) -> None:
    rows = load(folder="boolq", path="google/boolq")
    assert rows["train"][1]["passage"] == "One river weighs 1 pounds."
    assert rows["validation"][0]["passage"] == "One stone weighs 200 pounds."


def test_the_hub_is_asked_where_no_folder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(*arguments: Any, **words: Any) -> str:
        asked.append((arguments, words))
        return "rows"

    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    # lm-eval hands over a task's metadata as well
    assert load(folder="arc_easy", path="allenai/ai2_arc", name="ARC-Easy", version=1.0, label="ARC-e") == "rows"
    assert asked == [(("allenai/ai2_arc", "ARC-Easy"), {"revision": None})]


def test_a_folder_without_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELORA_DATA_DIR", str(write_rows(tmp_path, tasks=["piqa"])))
    with pytest.raises(RunError, match="has none of train.jsonl.gz, validation.jsonl.gz, test.jsonl.gz"):
        load(folder="boolq", path="google/boolq")


def test_the_hub_out_of_reach_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MOELORA_DATA_DIR", raising=False)
    with pytest.raises(RunError, match="'nobody/nothing' .* set MOELORA_DATA_DIR to a folder that holds x/validation"):
        load(folder="x", path="nobody/nothing")
