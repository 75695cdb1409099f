"""How every program ends: with its exit status, and an error of ours as one line instead of a traceback."""

from __future__ import annotations

import errno
import re
import signal
import sys
from collections.abc import Callable

from moelora.errors import MoeLoraError
from moelora.runs.signals import TerminatedError, signals_raise

# What a user does about: no space, no permission, a name too long, a file where a folder should be. Any other error of
# the system is a bug.
_OF_THE_DISK = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.ENAMETOOLONG,
    errno.ENOTDIR,
)
# How libraries say that memory is full: torch on a GPU and on a CPU, Python.
_OUT_OF_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory", re.IGNORECASE)


def exit_status(work: Callable[[], object], *, stopped: str, name: str = "error") -> int:
    """Do a program's work; its exit status, with what went wrong on standard error.

    Args:
        work: The work.
        stopped: What to say where it is interrupted, by Ctrl-C, SIGTERM or SIGHUP.
        name: What the line of an error begins with.

    Returns:
        0; 1 after an error; 128 and the signal's number where one ended it.
    """
    try:
        with signals_raise():
            work()
    except MoeLoraError as error:
        print(f"{name}: {error} {error.see()}", file=sys.stderr)
        return 1
    except (OSError, RuntimeError, MemoryError) as error:
        advice = _advice(error)
        if advice is None:
            raise
        print(f"{name}: {' '.join(str(error).split())[:300].rstrip('.')}. {advice}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"\n{stopped}", file=sys.stderr)
        return 128 + signal.SIGINT
    except TerminatedError as error:
        print(f"\n{signal.Signals(error.number).name}: {stopped}", file=sys.stderr)
        return 128 + error.number
    except Exception as error:
        # libraries written in Rust say "(os error 28)" in errors of their own: safetensors, tokenizers
        if "(os error " not in str(error):
            raise
        print(f"{name}: {' '.join(str(error).split()).rstrip('.')}. {_DISK}", file=sys.stderr)
        return 1
    return 0


_DISK = "Is there space, and the right to read and write?"


def _advice(error: BaseException) -> str | None:
    """What a user can do about an error of the system; None where it is a bug."""
    if isinstance(error, MemoryError) or _OUT_OF_MEMORY.search(str(error)):
        return (
            "Memory is full: lower per_device_train_batch_size (and raise gradient_accumulation_steps as much) or "
            "max_length, set activation_checkpointing: true, or in evaluation lower batch_size."
        )
    written = isinstance(error, RuntimeError) and "failed writing file" in str(error)  # torch.save on a full disk
    return _DISK if written or (isinstance(error, OSError) and error.errno in _OF_THE_DISK) else None
