"""How far work is that takes longer than a person waits without a word."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sized
from typing import TypeVar

from tqdm import tqdm

T = TypeVar("T")
# Work that is shorter says nothing.
QUIET_SECONDS = 10.0
# Between two lines of a log, after the first.
SECONDS_BETWEEN_LINES = 30.0


def track(items: Iterable[T], label: str, total: int | None = None) -> Iterator[T]:
    """Hand on items, and after ten seconds show on standard error how many are done and how long the rest takes.

    In a terminal that is a bar, which leaves when it is done; elsewhere it is a line now and then.

    Args:
        items: What is worked on.
        label: What is done to it.
        total: How many there are; None takes the length of `items`.

    Raises:
        TypeError: If `total` is None and `items` has no length.
    """
    if total is None:
        if not isinstance(items, Sized):
            raise TypeError(f"{type(items).__name__} has no length; give total.")
        total = len(items)
    if sys.stderr.isatty():
        yield from tqdm(items, desc=label, total=total, delay=QUIET_SECONDS, leave=False, dynamic_ncols=True)
        return
    started = last = time.monotonic()
    wait = QUIET_SECONDS
    for done, item in enumerate(items):
        now = time.monotonic()
        if done and now - last >= wait:
            last, wait = now, SECONDS_BETWEEN_LINES
            left = (now - started) / done * (total - done)
            print(f"{label}  {done}/{total}, {tqdm.format_interval(left)} left", file=sys.stderr, flush=True)
        yield item
