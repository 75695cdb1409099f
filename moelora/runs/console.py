"""What the programs print."""

from __future__ import annotations

import os

# Under torchrun every process runs the program; one of them speaks and writes.
IS_MAIN = os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Print at once, in one of the processes."""
    if IS_MAIN:
        print(text, flush=True)
