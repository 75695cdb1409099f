"""Work that takes long says how far it is."""

from __future__ import annotations

import itertools
import sys

import pytest

from moelora import progress
from moelora.progress import track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock is four seconds after the one before."""
    ticks = itertools.count(0, 4)
    monkeypatch.setattr("moelora.progress.time.monotonic", lambda: float(next(ticks)))


@pytest.mark.usefixtures("clock")
def test_a_log_gets_a_line_after_ten_seconds_and_then_every_thirty(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abcdefghijklmnopqrst"), "reading", 20)) == list("abcdefghijklmnopqrst")
    out, err = capsys.readouterr()
    assert out == ""
    # 12 s after two items: 6 s each; the next 32 s later after ten: 44 / 10 s each
    assert err == "reading  2/20, 01:48 left\nreading  10/20, 00:44 left\nreading  18/20, 00:08 left\n"


def test_what_is_quick_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(track({"a": 1}.items(), "reading")) == [("a", 1)]
    assert list(track([], "reading")) == []
    assert capsys.readouterr() == ("", "")


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(progress, "QUIET_SECONDS", 0.0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    assert list(track(range(3), "reading")) == [0, 1, 2]
    shown = capsys.readouterr().err
    assert "reading" in shown
    assert "/3" in shown


def test_a_total_is_needed() -> None:
    with pytest.raises(TypeError, match="list_iterator has no length; give total"):
        next(track(iter([1]), "reading"))
