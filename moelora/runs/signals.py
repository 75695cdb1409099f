"""SIGTERM and SIGHUP, which schedulers and closing terminals send, as exceptions."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

_SIGNALS = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


class TerminatedError(BaseException):
    """A signal asked the program to end; like KeyboardInterrupt, it is no error that anything should catch.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number


def raise_terminated(number: int, frame: FrameType | None) -> None:
    """The handler of `signals_raise`."""
    raise TerminatedError(number)


@contextmanager
def handled(handler: Any, instead_of: Any) -> Iterator[None]:
    """Give the signals a handler where they have a certain one now: a SIGHUP that `nohup` ignores stays ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may say what signals do
        return
    replaced = [number for number in _SIGNALS if signal.getsignal(number) is instead_of]
    for number in replaced:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in replaced:
            signal.signal(number, instead_of)


@contextmanager
def signals_raise() -> Iterator[None]:
    """Let the signals raise `TerminatedError`, where nobody else handles them."""
    with handled(raise_terminated, signal.SIG_DFL):
        yield
