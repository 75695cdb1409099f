"""The programs that write tests/RELIABILITY.md, in small."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import __version__ as transformers_version

from tests import long_runs, matrix
from tests.reliability import write_section


def test_a_section_replaces_its_last_version_alone(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    write_section(page, "First", "make first", ["one"])
    write_section(page, "Second", "make second", ["two"])
    page.write_text(page.read_text() + "\nBelow.\n")
    write_section(page, "First", "make first", ["three"])
    text = page.read_text()
    assert text.startswith("# Reliability\n")
    assert text.endswith("\nBelow.\n")
    assert "one" not in text.split("## First")[1]
    order = [text.index(each) for each in ("## First", "`make first`, 20", "\nthree\n", "## Second", "\ntwo\n")]
    assert order == sorted(order)
    assert text.count(f"transformers {transformers_version}") == 2
    assert text.count("<!-- ") == 4


JUNIT = """<testsuites><testsuite name="pytest" errors="1" failures="1" skipped="2" tests="10" time="123.4">
<testcase classname="tests.a" name="test_b[c]" time="1"/>
<testcase classname="tests.a" name="test_d" time="1"><failure message="no">text</failure></testcase>
<testcase classname="tests.e" name="test_f" time="1"><error message="no">text</error></testcase>
</testsuite></testsuites>"""


def test_the_matrix_counts_and_names_what_failed(tmp_path: Path) -> None:
    junit = tmp_path / "junit.xml"
    junit.write_text(JUNIT)
    lines = matrix.summary(junit)
    assert lines[2] == "| 10 | 6 | 2 | 2 | 2 |"
    assert lines[3:] == ["", "- failed: `tests.a.test_d`", "- failed: `tests.e.test_f`"]
    assert all((Path(__file__).parents[1] / test).exists() for test in matrix.TESTS)


def test_long_runs_in_small(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    # in so few steps everything is still being allocated, and the first ones compile
    monkeypatch.setattr(long_runs, "memory", lambda: 0.0)
    monkeypatch.setattr(long_runs, "SLOWER", 100.0)
    assert long_runs.main(["--steps", "20", "--tokens", "12", "--adapters", "3", "--output", str(page)]) == 0
    printed = capsys.readouterr().out
    for words in (
        "20 steps of training",
        "12 tokens generated",
        "3 adapters on one model",
        "0 tokens that one forward",
    ):
        assert words in printed
        assert words in page.read_text()
    assert page.read_text().count("| none |") == 3
    monkeypatch.setattr(long_runs, "many_adapters", lambda count: long_runs.Found.of("a", "b", it_is_well=False))
    monkeypatch.setattr(long_runs, "long_generation", lambda tokens: long_runs.Found.of("c", "d"))
    monkeypatch.setattr(long_runs, "many_steps", lambda steps: long_runs.Found.of("e", "f"))
    assert long_runs.main([]) == 1
    assert "NOT: it is well" in capsys.readouterr().out
