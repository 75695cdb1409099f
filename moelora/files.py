"""Files and folders that are there whole or not at all, whenever the process is killed."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

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

    Args:
        file: The file; its folder is made.
        content: A text, written as UTF-8, or bytes.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(prefix=f".{file.name}-", dir=file.parent)
    try:
        with os.fdopen(descriptor, "wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        # mkstemp makes files that only their owner reads
        Path(name).chmod(0o644)
        Path(name).replace(file)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes its place when the block ends without an error.

    Raises:
        OSError: If something that is not empty has the place by then: a rename never replaces it.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as temporary:
        ready = Path(temporary) / folder.name
        ready.mkdir()
        yield ready
        ready.rename(folder)
