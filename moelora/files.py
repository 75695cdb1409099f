"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from moelora.errors import MoeLoraError

try:
    import fcntl
except ImportError:  # Windows: nothing tells what a killed process has left from what is being written
    fcntl = None  # type: ignore[assignment]

# What a tokenizer saves beside an adapter, its chat template with it.
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
)

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)


def public_name(source: str | Path) -> str:
    """What others may read of where something came from: a name on the Hub, or of a local path the last part alone."""
    source = str(source)
    if _HUB_NAME.fullmatch(source) and not Path(source).exists():
        return source
    if Path(source).exists():
        source = str(Path(source).resolve())
    return re.split(r"[\\/]", source.rstrip("\\/"))[-1]


def is_hub_name(name: str) -> bool:
    """Whether a published name is that of a Hub repository: it has an owner, and a local folder's has none."""
    return _HUB_NAME.fullmatch(name) is not None


def write_atomically(file: Path, content: str | bytes) -> None:
    """Write a file so that a reader, or the next run after a kill, never sees half of it.

    What a process that was killed here has left beside the file is removed by the next one that writes it.

    Args:
        file: The file; its folder is made.
        content: A text, written as UTF-8, or bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    with _beside(file) as temporary:
        with temporary.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        temporary.replace(file)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends without an error; else nothing is left of it.

    What a process that was killed here has left is removed by the next one that makes the folder.

    Raises:
        OSError: If something that is not empty has the place by then: a rename never replaces it.
    """
    missing = [parent for parent in folder.parents if not parent.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _beside(folder, is_folder=True) as ready:
            yield ready
            ready.rename(folder)
    except BaseException:
        for parent in missing:
            with suppress(OSError):
                parent.rmdir()
        raise


@contextmanager
def _beside(place: Path, *, is_folder: bool = False) -> Iterator[Path]:
    """A new hidden file or folder beside `place`; if the block does not rename it, it is gone after the block.

    It is locked meanwhile, and the system drops a lock with its process: what is there without one was left by a
    process that was killed, and is removed first. Several processes may write one file at a time.
    """
    _remove_leftovers(place.parent, re.escape(place.name))
    while True:
        path = place.with_name(f".{place.name}-{secrets.token_hex(4)}.part")
        if is_folder:
            path.mkdir()
        else:
            path.touch(exist_ok=False)
        lock = _lock(path, wait=True)
        if path.exists():
            break
        # another process took it for a leftover before it was locked
        _unlock(lock)
    try:
        yield path
    finally:
        _remove(path)
        _unlock(lock)


def remove_leftovers(folder: Path) -> None:
    """Remove what processes that were killed here have left of files and folders that they were writing.

    Each is removed by who writes it the next time, too; this is for what may never be written again.

    Args:
        folder: A folder of ours; it need not exist.
    """
    if folder.is_dir():
        _remove_leftovers(folder, ".+")


def _remove_leftovers(folder: Path, name: str) -> None:
    """Remove those of files and folders whose names match the pattern `name`, but not what is being written."""
    for path in list(folder.iterdir()):
        if not re.fullmatch(rf"\.{name}-[0-9a-f]{{8}}\.part", path.name):
            continue
        lock = _lock(path, wait=False)
        if lock is not None:
            _remove(path)
            _unlock(lock)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(path: Path, *, wait: bool) -> int | None:
    """Lock a file or folder; the descriptor that holds the lock, or None if it cannot be had.

    Args:
        path: The file or folder.
        wait: Whether to wait while another process has it.
    """
    if fcntl is None:
        return None
    descriptor = None
    try:
        # over NFS only what is open for writing can be locked, which a folder cannot be
        descriptor = os.open(path, os.O_NOFOLLOW | (os.O_RDONLY if path.is_dir() else os.O_RDWR))
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        _unlock(descriptor)
        return None
    return descriptor


def _unlock(descriptor: int | None) -> None:
    if descriptor is not None:
        os.close(descriptor)


@contextmanager
def claimed(file: Path) -> Iterator[bool]:
    """Keep other processes off what a file stands for; the claim ends with the process, however it ends.

    Where files cannot be locked (Windows) everything is claimed by whoever asks.

    Args:
        file: A file of no content, which is made with its folder.

    Yields:
        Whether it is this process's: False while another has it.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield True
        return
    with file.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True


@contextmanager
def written_folder(folder: Path, error: type[MoeLoraError]) -> Iterator[Path]:
    """`new_folder` whose failures to write are errors of ours.

    Args:
        folder: The folder.
        error: The class to raise.

    Raises:
        MoeLoraError: Of the class `error`, if the folder cannot be written.
    """
    try:
        with new_folder(folder) as ready:
            yield ready
    except Exception as cause:
        # libraries written in Rust say "(os error 28)" in errors of their own: safetensors, tokenizers
        if not isinstance(cause, OSError) and "(os error " not in str(cause):
            raise
        reason = " ".join(str(cause).split()).rstrip(".")
        raise error(
            f"the output {str(folder)!r} cannot be written: {reason}. Nothing is left there; is there space, and the "
            "right to write?"
        ) from cause
