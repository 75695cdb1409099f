from __future__ import annotations

from pathlib import Path

import pytest

from moelora.files import new_folder, write_atomically


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
