"""A conversation with an adapter, through the standard input."""

from __future__ import annotations

import io
import re
import shutil
from pathlib import Path

import pytest

from moelora_cli import main

WORDS = ["--max-new-tokens", "4"]


def talk(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], lines: str, *words: str
) -> tuple[int, list[str], str]:
    """Exit status, lines of the output after the greeting, and the errors."""
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    capsys.readouterr()
    status = main(["chat", *words, *WORDS])
    said = capsys.readouterr()
    return status, said.out.splitlines()[1:], said.err


def test_a_conversation(
    originals: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    mixture, base, other = str(originals / "named"), str(originals / "base"), str(tmp_path / "other")
    shutil.copytree(mixture, other)
    lines = ["1 2 3", "", "/off", "1 2 3", f"/adapter {other}", "/new", "1 2 3", f"/adapter {mixture}"]
    lines += ["/adapter nowhere/at-all/x", "/what", "/quit", "not read"]
    status, said, errors = talk(monkeypatch, capsys, "\n".join(lines), mixture, "--model", base)
    assert status == 0
    text = "\n".join(said)
    assert "The base model answers." in said
    assert "[the base model]" in said
    assert f"{other} answers." in said
    assert len(re.findall(r"\[experts: (?:one|two|three|base model) 100%\]", text)) == 2
    assert said[-1] == f"{mixture} answers."
    first, second = errors.splitlines()
    assert first.startswith("moelora chat: adapter 'nowhere/at-all/x' cannot be loaded: ")
    assert second.startswith("moelora chat: '/what' is no command; allowed: /adapter NAME, /off, /new, /quit.")


def test_what_cannot_begin(
    originals: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    by_task, base = str(originals / "by-task"), str(originals / "base")
    status, _, errors = talk(monkeypatch, capsys, "1 2\n", by_task, "--model", base)
    assert (status, errors.count("\n")) == (1, 1)
    assert "the adapter routes by the task, and --task is None; allowed: " in errors
    name = errors.rsplit("allowed: ", 1)[1].split(",")[0].strip(". \n")
    status, said, _ = talk(monkeypatch, capsys, "1 2\n", by_task, "--model", base, "--task", name)
    assert status == 0
    assert said[-1] == f"[experts: {name} 100%]"
    status, _, errors = talk(monkeypatch, capsys, "", by_task, "--model", base, "--temperature", "-1")
    assert status == 1
    assert "--temperature -1.0; allowed: at least 1 and at least 0" in errors
