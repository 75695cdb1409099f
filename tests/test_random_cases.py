"""A few of the random cases of `tests/random_cases.py`, with the table that they make."""

from __future__ import annotations

from pathlib import Path

from tests.random_cases import main


def test_bad_input_is_refused_in_one_line_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    main(["--cases", "150", "--output", str(page)])
    lines = page.read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ")]
    assert rows.pop(0) == ["case", "worked", "refused"]
    worked, refused = ([int(row[column]) for row in rows] for column in (1, 2))
    assert sum(worked) + sum(refused) == 150
    assert all(map(sum, zip(worked, refused, strict=True)))
    assert len(rows) == 5
    assert min(sum(worked), sum(refused)) > 20
