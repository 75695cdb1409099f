"""What is wrong with a row is said with its file, its place in it, and its field."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from moelora.errors import MoeLoraError
from moelora.runs.config import DatasetConfig
from moelora.runs.data import load_rows
from tests.runs.tiny import tiny_tokenizer

GOOD = {"prompt": "a", "completion": "b"}


def lines(*rows: Any) -> bytes:
    return "\n".join(map(json.dumps, rows)).encode()


USER = {"role": "user", "content": "a"}
FAULTS: dict[str, tuple[str, bytes, str]] = {
    "null": ("a.jsonl", lines(GOOD, {**GOOD, "completion": None}), r"completion of row 2 of \S*a.jsonl is missing"),
    "missing": ("a.jsonl", lines(GOOD, GOOD, {"prompt": "a"}), r"completion of row 3 of \S*a.jsonl is missing"),
    "a null number": ("a.jsonl", lines({"text": 1}, {"text": None}), r"text of row 2 of \S*a.jsonl is missing"),
    "blank prompt": ("a.jsonl", lines(GOOD, {**GOOD, "prompt": " "}), r"prompt of row 2 of \S* is ' '; needed: a text"),
    "all blank": ("a.jsonl", lines({**GOOD, "completion": ""}, {**GOOD, "completion": " "}), "blank in all 2 rows"),
    "a float": (
        "a.jsonl",
        lines({**GOOD, "completion": 0.5}),
        "completion of row 1 .* is 0.5; needed: a text",
    ),
    "a mapping": ("a.jsonl", lines({**GOOD, "prompt": {"a": 1}}), "prompt of row 1 .* is {'a': 1}; needed"),
    "a list": ("a.jsonl", lines({"text": ["a"]}), r"text of row 1 .* is \['a'\]; needed: a text"),
    "two kinds": ("a.jsonl", lines({"prompt": "a", "completion": [USER]}), "row 1 .* has a text and a chat"),
    "no task": ("a.jsonl", lines({**GOOD, "task": "t"}, {**GOOD, "task": None}), "task of row 2 .* is missing"),
    "no content": ("a.jsonl", lines({"messages": [{"role": "user", "content": None}]}), "messages of row 1 .* content"),
    "no rows": ("a.jsonl", b"\n\n", r"a.jsonl: no rows"),
    "nothing": ("a.jsonl", b"", r"a.jsonl is empty; needed: rows"),
    "no UTF-8": ("a.jsonl", lines(GOOD) + b'\n{"prompt": "\xff"}', r"line 2 of \S*a.jsonl is not UTF-8"),
    "broken gzip": ("a.jsonl", gzip.compress(lines(GOOD))[:-9], r"a.jsonl: not readable as .jsonl"),
    "broken JSON": ("a.json", b"{]", "a.json: not readable as .json"),
    "no parquet": ("a.parquet", b"hello", "a.parquet: not readable as .parquet"),
    "blank cell": ("a.csv", b"prompt,completion\na,b\nc,\n", r"completion of row 2 of \S*a.csv is missing"),
    "cells too many": ("a.csv", b"prompt,completion\na,b,c\n", r"line 2 of \S*a.csv has 3 cells, and the header 2"),
    "no UTF-8 in a table": ("a.csv", b"prompt,completion\na,\xff\n", r"of \S*a.csv is not readable: 'utf-8'"),
    "two columns of a name": ("a.csv", b"text,text\na,b\n", r"the header of \S*a.csv is \['text', 'text'\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_named(fault: str, tmp_path: Path) -> None:
    name, content, message = FAULTS[fault]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(MoeLoraError, match=message) as raised:
        load_rows(DatasetConfig(files=str(tmp_path / name), chat=False), tiny_tokenizer())
    assert "\n" not in str(raised.value)


def test_the_row_is_counted_in_its_own_file(tmp_path: Path) -> None:
    for name, rows in (("a", [GOOD, GOOD]), ("b", [GOOD, {**GOOD, "completion": None}])):
        (tmp_path / f"{name}.jsonl").write_bytes(lines(*rows))
    with pytest.raises(MoeLoraError, match=r"completion of row 2 of \S*b.jsonl is missing"):
        load_rows(DatasetConfig(files=str(tmp_path / "*.jsonl"), chat=False), tiny_tokenizer())


def test_whole_numbers_are_texts_and_cells_are_as_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(lines({"prompt": 1, "completion": 2}))
    (tmp_path / "b.csv").write_text('prompt,completion\nNA,007\n"a,b",1.50\n')
    a, b = (
        load_rows(DatasetConfig(files=str(file), chat=False), tiny_tokenizer()) for file in sorted(tmp_path.iterdir())
    )
    assert list(a) == [{"prompt": "1", "completion": "2"}]
    assert sorted((row["prompt"], row["completion"]) for row in b) == [("NA", "007"), ("a,b", "1.50")]
