"""The error that the programs print without a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


class RunError(ValueError):
    """A run that cannot start or go on: the message says what, the value, what is allowed, and the likely fix."""


def exit_status(work: Callable[[], object], stopped: str) -> int:
    """Do a program's work; its exit status, with what went wrong on standard error.

    Args:
        work: The work.
        stopped: What to say where it is interrupted.
    """
    from moelora.errors import MoeLoraError

    try:
        work()
    except (RunError, MoeLoraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    return 0


def one_line(error: BaseException | str) -> str:
    """The message of another library as a sentence within ours."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
