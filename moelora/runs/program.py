"""How every program ends: with its exit status, and an error of ours as one line instead of a traceback."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

from moelora.errors import MoeLoraError

# What a user does about: no space, no permission, a name too long. Any other error of the system is a bug.
_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
)


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
    except OSError as error:
        if error.errno not in _OF_THE_DISK:
            raise
        print(
            f"{name}: {' '.join(str(error).split())}. Is there space, and the right to read and write?", file=sys.stderr
        )
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 130
    return 0
