"""Programs in processes of their own that are killed, by the clock or before a change to a file.

A process is forked from one that has imported everything, so that a trial costs its work and no start.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# What changes files, with the positions of the paths among an audit event's arguments. Reading is not among them.
_CHANGES = {"os.rename": (0, 1), "os.mkdir": (0,), "os.rmdir": (0,), "os.remove": (0,), "os.link": (1,)}
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


@dataclass(frozen=True)
class Kill:
    """When a process is killed with SIGKILL.

    Args:
        change: Before which of its changes to files, counted from 0.
        seconds: After how many seconds.
    """

    change: int | None = None
    seconds: float | None = None

    def __str__(self) -> str:
        return f"before change {self.change} to a file" if self.change is not None else f"after {self.seconds:.2f} s"


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Args:
        status: Its exit status; None if it was killed.
        seconds: How long it ran.
        changes: Its changes to files under the place, one a line: event and path.
        output: What it printed.
    """

    status: int | None
    seconds: float
    changes: list[str]
    output: str


def run(program: Callable[[], int], place: Path, kill: Kill | None = None) -> Ended:
    """Run a program in a process of its own.

    Args:
        program: Returns its exit status.
        place: The folder under which changes to files count.
        kill: When to kill it; None for never.
    """
    log, changes = place.with_suffix(".log"), place.with_suffix(".changes")
    started = time.monotonic()
    child = os.fork()
    if child == 0:
        _become(program, place, log, changes, kill)
    if kill is not None and kill.seconds is not None:
        deadline = started + kill.seconds
        while time.monotonic() < deadline:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                break
            time.sleep(0.005)
        else:
            os.kill(child, signal.SIGKILL)
            _, status = os.waitpid(child, 0)
    else:
        _, status = os.waitpid(child, 0)
    return Ended(
        os.waitstatus_to_exitcode(status) if not os.WIFSIGNALED(status) else None,
        time.monotonic() - started,
        changes.read_text().splitlines() if changes.exists() else [],
        log.read_text(errors="replace"),
    )


def _become(program: Callable[[], int], place: Path, log: Path, changes: Path, kill: Kill | None) -> None:
    """Be the child; never returns."""
    status = 70
    try:
        os.setsid()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        # whatever the parent had in their place
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        _watch(place, changes, None if kill is None else kill.change)
        status = program()
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def _watch(place: Path, changes: Path, at: int | None) -> None:
    """Note each change to a file under a folder, and be killed before one of them."""
    root = str(place.resolve())
    handle = os.open(changes, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    count = 0

    def hook(event: str, given: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "open":
            path, _, flags = given
            if not isinstance(flags, int) or not flags & _WRITES:
                return
            paths = [path]
        elif event in _CHANGES:
            paths = [given[position] for position in _CHANGES[event]]
        else:
            return
        names = [os.fsdecode(path) for path in paths if isinstance(path, str | bytes | os.PathLike)]
        inside = [name for name in names if os.path.abspath(name).startswith(root)]  # noqa: PTH100
        if not inside:
            return
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        os.write(handle, f"{event} {os.path.relpath(inside[0], root)}\n".encode())

    sys.addaudithook(hook)
