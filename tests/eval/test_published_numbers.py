"""Every score that README and docs quote with its standard error stands in some receipt.

It says that no number is made up or out of date, not that it stands beside the right name.
"""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import pytest

from eval.compare.cells import Board
from eval.compare.schema import load_benchmark
from eval.compare.summary import summarize
from eval.scoring.scores import percent

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "eval" / "results"
NUMBER = re.compile(r"(?<![\d.])(\d+\.\d+) ± (\d+\.\d+)")
PRINTED = "docs/sequential.md"
"""Has what `make quickstart` printed, of which there is no receipt."""


def numbers(file: Path) -> set[str]:
    return {f"{value} ± {error}" for value, error in NUMBER.findall(file.read_text())}


@pytest.fixture(scope="module")
def known() -> set[str]:
    """What the tables of results hold, and the differences of any two methods of a comparison."""
    found = set().union(*(numbers(page) for page in RESULTS.glob("**/README.md") if page.parent != RESULTS))
    for file in sorted((ROOT / "configs" / "benchmarks").glob("*.yaml")):
        config = load_benchmark(file)
        config.results_dir = str(ROOT / config.results_dir)
        summary = summarize(Board(config)) if Path(config.results_dir).is_dir() else None
        if summary is None:
            continue
        for ours, theirs in permutations(summary.methods, 2):
            if ours.seeds.keys() & theirs.seeds.keys():
                found.add(percent(summary.difference(ours, theirs, summary.labels)))
    return found


@pytest.mark.parametrize(
    "page",
    [
        "README.md",
        "eval/results/README.md",
        *sorted(f"docs/{each.name}" for each in (ROOT / "docs").glob("*.md") if f"docs/{each.name}" != PRINTED),
    ],
)
def test_a_quoted_number_stands_in_a_receipt(page: str, known: set[str]) -> None:
    unknown = numbers(ROOT / page) - known - numbers(ROOT / PRINTED)
    assert not unknown, f"{page} quotes {sorted(unknown)}, which no page of results has"


def test_what_no_receipt_has_is_seen(known: set[str]) -> None:
    table = numbers(RESULTS / "skills" / "README.md")
    assert "43.5 ± 3.2" in table & known
    assert "43.5 ± 2.8" not in table  # what skills/ had before a method's own scatter counted
