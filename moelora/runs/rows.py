"""Whether training rows hold what is trained on: one check of every field of every row, whatever they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moelora.errors import RunError
from moelora.runs.recipes import RECIPES

_CHATS = ("prompt", "completion", "chosen", "rejected")
_TEXTS = ("text", "answer")


def checked_rows(rows: Any, where: Callable[[int], str], recipe: str = "sft") -> Any:
    """The rows, with whole numbers in place of texts written out.

    Args:
        rows: A `datasets.Dataset` with the columns of the recipe; it may have task.
        where: Names a row by its number, for messages: its file and its place in it.
        recipe: The recipe that trains on them.

    Raises:
        RunError: Names the row and the field that is missing, of another type, or blank. Of a recipe that trains on
            completions some may be blank, but not all.
    """
    for name in (*_CHATS, *_TEXTS):
        if name in rows.column_names and getattr(rows.features[name], "dtype", "").startswith(("int", "uint")):
            rows = _as_texts(rows, name, where)
    may_be_blank = {"completion", "text"} if recipe in ("sft", "sequential") else set()
    filled = False
    for index, row in enumerate(rows):
        for name, value in row.items():
            if value is None:
                raise RunError(f"{name} of {where(index)} is missing. {_FIX}")
            wrong = _wrong(name, value, recipe, name in may_be_blank)
            if wrong is not None:
                raise RunError(f"{name} of {where(index)} is {_short(value)}; needed: {wrong}. {_FIX}")
        kinds = {isinstance(row[name], str) for name in ("prompt", "completion") if name in row}
        if may_be_blank and len(kinds) > 1:
            raise RunError(
                f"{where(index)} has a text and a chat as prompt and completion; needed: two texts, or two chats."
            )
        filled = filled or not may_be_blank or _is_filled(row)
    if len(rows) and not filled:
        name = next(name for name in ("completion", "text", "messages") if name in rows.column_names)
        raise RunError(
            f"{name} is blank in all {len(rows)} rows; needed: something to learn. Map another column to it."
        )
    return rows


_FIX = "Mend the row or leave it out, or map another column with dataset.columns."


def _as_texts(rows: Any, name: str, where: Callable[[int], str]) -> Any:
    from datasets import Value

    missing = next((index for index, value in enumerate(rows[name]) if value is None), None)
    if missing is not None:
        raise RunError(f"{name} of {where(missing)} is missing. {_FIX}")
    return rows.cast_column(name, Value("string"))


def _wrong(name: str, value: Any, recipe: str, may_be_blank: bool) -> str | None:
    """What should stand in place of a value, or None if it is right."""
    if name == "task":
        return None if isinstance(value, (str, int)) and not isinstance(value, bool) else "the name of a task"
    if name == "label":
        return _wrong_label(value, recipe)
    if isinstance(value, str) and name != "messages":
        return None if may_be_blank or value.strip() else "a text that is not blank"
    if name in _TEXTS:
        return "a text"
    if name in RECIPES[recipe].columns and isinstance(value, list):
        return _wrong_chat(value)
    return "a list of messages" if name == "messages" else "a text, or a list of messages"


def _wrong_label(value: Any, recipe: str) -> str | None:
    if recipe == "kto":
        return None if isinstance(value, bool) or value in (0, 1) else "true or false"
    fits = isinstance(value, int) or (isinstance(value, str) and value.strip())
    return None if fits else "a class, as a text or a whole number"


def _wrong_chat(messages: list[Any]) -> str | None:
    if not messages:
        return "a list of messages"
    for message in messages:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "messages that have a role and content"
        content, more = message.get("content"), {k: v for k, v in message.items() if k not in ("role", "content")}
        # a call of a tool has no content of its own
        if not isinstance(content, (str, list)) and not any(v is not None for v in more.values()):
            return "messages whose content is a text"
    return None


def _is_filled(row: Mapping[str, Any]) -> bool:
    """Whether there is something to learn in a row."""
    value = row.get("completion", row.get("text", row.get("messages")))
    return bool(value.strip()) if isinstance(value, str) else any(message.get("content") for message in value)


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 80 else f"{found[:80]}..."
