"""How texts of ours say durations, commits, the messages of other libraries, and in Markdown the words of others."""

from __future__ import annotations

import re
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


def code(text: object) -> str:
    """A code span on one line: in it Markdown and HTML mean nothing."""
    words = " ".join("".join(char if char.isprintable() else " " for char in str(text)).split()) or " "
    longest = max(map(len, re.findall("`+", words)), default=0)
    fence = "`" * (longest + 1)
    space = " " if words.startswith("`") or words.endswith("`") else ""
    return f"{fence}{space}{words}{space}{fence}"


def text(words: object) -> str:
    """Words on one line in which links, emphasis, code and HTML are shown as they are written."""
    line = " ".join(str(words).split()).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*\[\]])", r"\\\1", line)
