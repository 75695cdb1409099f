from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import pytest

from moelora.files import new_folder, write_atomically
from tests.soak.kills import Kill, run


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "a.txt"
    write_atomically(file, "é")
    assert file.read_bytes() == "é".encode()
    write_atomically(file, b"\x00")
    assert file.read_bytes() == b"\x00"
    assert [each.name for each in file.parent.iterdir()] == ["a.txt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "a.txt"
    write_atomically(file, "old")

    def full(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="no space"):
        write_atomically(file, "new")
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_appears_when_it_is_complete(tmp_path: Path) -> None:
    with new_folder(tmp_path / "a" / "b") as folder:
        (folder / "x").touch()
        assert not (tmp_path / "a" / "b").exists()
    assert [each.name for each in (tmp_path / "a").rglob("*")] == ["b", "x"]
    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "a" / "c") as folder:
        raise KeyboardInterrupt
    assert [each.name for each in (tmp_path / "a").iterdir()] == ["b"]


def _write(place: Path) -> int:
    write_atomically(place / "a.txt", "whole")
    return 0


def _fill(place: Path) -> int:
    with new_folder(place / "a") as ready:
        (ready / "x").write_text("whole")
    return 0


def _stopped(folder: Path) -> int:
    with new_folder(folder):
        raise SystemExit(0)


WRITERS = {"a.txt": (_write, "a.txt"), "a": (_fill, "a/x")}


@pytest.mark.parametrize("name", WRITERS)
def test_what_a_kill_leaves_is_removed_by_the_next_writer(name: str, tmp_path: Path) -> None:
    """Killed with SIGKILL before each change to a file in turn."""
    write, written = WRITERS[name]
    left = 0
    for change in itertools.count():
        place = tmp_path / str(change)
        place.mkdir()
        mine = {f".{name}-notes", f".{name}-notes.part", f".{name}.part", f".b.{name}-0123abcd.part"}
        for each in mine:
            (place / each).touch()
        if run(partial(write, place), place, Kill(change=change)).status is not None:
            break
        left += bool({path.name for path in place.iterdir()} - {*mine, name})
        if not (place / name).exists():
            write(place)
        assert {path.name for path in place.iterdir()} == {*mine, name}
        assert (place / written).read_text() == "whole"
    assert left >= 2
    assert {path.name for path in place.iterdir()} == {*mine, name}


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    with new_folder(place / "a") as ready:
        (ready / "x").write_text("mine")
        run(partial(_stopped, place / "a"), place)
        assert [path.name for path in place.iterdir()] == [ready.name]
    assert (place / "a/x").read_text() == "mine"

    def other_writes(descriptor: int) -> None:
        monkeypatch.undo()
        assert run(partial(_write, place), place).status == 0
        assert (place / "a.txt").read_text() == "whole"

    monkeypatch.setattr("os.fsync", other_writes)
    write_atomically(place / "a.txt", "mine")
    assert (place / "a.txt").read_text() == "mine"
    assert {path.name for path in place.iterdir()} == {"a", "a.txt"}
