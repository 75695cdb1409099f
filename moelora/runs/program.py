"""How every program ends: with its exit status, and an error of ours as one line instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from moelora.errors import MoeLoraError


def exit_status(work: Callable[[], object], *, stopped: str, name: str = "error") -> int:
    """Do a program's work; its exit status, with what went wrong on standard error.

    Args:
        work: The work.
        stopped: What to say where it is interrupted.
        name: What the line of an error begins with.
    """
    try:
        work()
    except MoeLoraError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    return 0
