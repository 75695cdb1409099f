"""How texts of ours say durations, commits, and the messages of other libraries."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def one_line(error: BaseException | str) -> str:
    """The message of another library as a sentence within ours."""
    text = " ".join(str(error).split())
    return text if text.endswith((".", "!", "?")) else f"{text}."


def minutes(seconds: float) -> str:
    """A duration as a person says it."""
    whole, rest = divmod(round(seconds), 60)
    return f"{whole} min {rest:02d} s" if whole else f"{rest} s"


def commit_words(git: Mapping[str, Any] | None) -> str:
    """The commit that a receipt's `git` names, and whether there were local changes."""
    if not git:
        return "not a git checkout"
    return f"{git['commit'][:12]}{' with local changes' if git.get('dirty') else ''}"
