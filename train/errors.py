"""The error that the programs print without a traceback."""

from __future__ import annotations


class RunError(ValueError):
    """A run that cannot start or go on: the message says what, the value, what is allowed, and the likely fix."""


def one_line(error: BaseException | str) -> str:
    """The message of another library as a sentence within ours."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."
