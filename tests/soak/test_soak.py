"""That the soak finds what it is to find; `make soak` runs it at length."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from tests.soak.kills import Kill, run
from tests.soak.report import write
from tests.soak.scenarios import Scenario
from tests.soak.trial import attempt, whole

# The programs of these tests are plain Python, so that forking a process with threads of torch in it does no harm.
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="forks"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded"),
]


def _prepare(place: Path) -> int:
    (place / "input").write_text("3")
    return 0


def _careful(place: Path) -> int:
    """Writes beside the result, and removes what an earlier run left."""
    half = place / "half"
    half.unlink(missing_ok=True)
    half.write_text((place / "input").read_text() * 2)
    (place / "out").mkdir(exist_ok=True)
    half.rename(place / "out" / "result")
    return 0


def _careless(place: Path) -> int:
    """Counts how often it was begun, and leaves a hidden file when it is killed."""
    count = place / "input"
    count.write_text(str(int(count.read_text() or 0) + 1))
    (place / ".half").write_text("")
    (place / "out").mkdir(exist_ok=True)
    (place / ".half").rename(place / "out" / "result")
    (place / "out" / "count.json").write_text(count.read_text())
    return 0


def _slow() -> int:
    time.sleep(60)
    return 0


def test_a_program_is_killed_before_each_change(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    _prepare(place)
    ended = run(lambda: _careful(place), place)
    assert (ended.status, ended.changes) == (0, ["os.remove half", "open half", "os.mkdir out", "os.rename half"])
    (place / "out" / "result").unlink()
    killed = run(lambda: _careful(place), place, Kill(change=3))
    assert killed.status is None
    assert (place / "half").read_text() == "33"
    assert not (place / "out" / "result").exists()


def test_a_program_is_killed_by_the_clock(tmp_path: Path) -> None:
    place = tmp_path / "place"
    place.mkdir()
    assert run(_slow, place, Kill(seconds=0.2)).status is None
    assert run(lambda: 3, place, Kill(seconds=60)).status == 3
    failed = run(lambda: len(Path("/nothing/there").read_text()), place)
    assert failed.status == 70
    assert "FileNotFoundError" in failed.output


def test_what_is_careful_passes_and_what_is_not_is_told(tmp_path: Path) -> None:
    good = Scenario("careful", _prepare, _careful, ("out",))
    expected = whole(good, tmp_path / "good")
    for change in range(len(expected.ended.changes)):
        outcome = attempt(good, expected, tmp_path / "good", [Kill(change=change)])
        assert (outcome.killed, outcome.faults) == (1, ())
    bad = Scenario("careless", _prepare, _careless, ("out",))
    expected = whole(bad, tmp_path / "bad")
    outcome = attempt(bad, expected, tmp_path / "bad", [Kill(change=4)])
    assert outcome.killed == 1
    assert outcome.faults == ("out/count.json differs",)


def test_the_table_replaces_the_one_before(tmp_path: Path) -> None:
    good = Scenario("careful", _prepare, _careful, ("out",))
    expected = whole(good, tmp_path / "good")
    outcome = attempt(good, expected, tmp_path / "good", [Kill(change=1)])
    page = tmp_path / "page.md"
    write(page, [outcome], {"careful": 4})
    page.write_text("# Above\n" + page.read_text() + "below\n")
    write(page, [outcome, outcome], {"careful": 4})
    text = page.read_text()
    assert text.startswith("# Above\n")
    assert text.endswith("below\n")
    assert text.count("| careful | 2 | 1 of 4 | 2 of 2 |") == 1
    assert text.count("| careful |") == 1
