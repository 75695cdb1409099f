"""Whether training rows hold what is trained on: one check of every field of every row, whatever they came from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moelora.errors import RunError

_TEXT = ("prompt", "completion", "text", "chosen", "rejected", "answer")
# What teaches nothing where it is blank; of completions and texts some may be.
_NOT_BLANK = ("prompt", "chosen", "rejected", "answer")


def checked_rows(rows: Any, recipe: str, where: Callable[[int], str]) -> Any:
    """The rows, with whole numbers in place of texts written out.

    Args:
        rows: A `datasets.Dataset` with the columns of one of the recipe's forms; it may have task.
        recipe: The recipe; `label` is a rating for kto, and a class otherwise.
        where: Names a row by its number, for messages: its file and its place in it.

    Raises:
        RunError: Names the row and the field that is missing, of another type, or empty in all rows.
    """
    for name in _TEXT:
        if name in rows.column_names and getattr(rows.features[name], "dtype", "").startswith(("int", "uint")):
            rows = _as_texts(rows, name, where)
    checks = {**dict.fromkeys(_TEXT, _check_text_or_chat), "messages": _check_chat, "task": _check_task}
    checks["label"] = _check_rating if recipe == "kto" else _check_class
    filled = False
    for index, row in enumerate(rows):
        for name, value in row.items():
            if value is None:
                raise RunError(f"{name} of {where(index)} is missing. {_FIX}")
            wrong = checks[name](name, value)
            if wrong is not None:
                raise RunError(f"{name} of {where(index)} is {_short(value)}; {wrong} {_FIX}")
        _check_kinds(row, where, index)
        filled = filled or _is_filled(row)
    if len(rows) and not filled:
        name = next(name for name in ("completion", "text", "messages") if name in rows.column_names)
        raise RunError(
            f"{name} is blank in all {len(rows)} rows; needed: something to learn. Map another column to it."
        )
    return rows


def _check_kinds(row: Mapping[str, Any], where: Callable[[int], str], index: int) -> None:
    """Prompt and replies are texts, or chats; preferences that are whole chats may have their prompt as a text too."""
    names = [name for name in ("prompt", "completion", "chosen", "rejected") if name in row]
    kinds = {name: isinstance(row[name], str) for name in names}
    pair = {name: kind for name, kind in kinds.items() if name in ("chosen", "rejected")}
    if pair and not any(pair.values()) and all(row[name][0]["role"] != "assistant" for name in pair):
        kinds = pair
    if len(set(kinds.values())) > 1:
        raise RunError(
            f"{where(index)} has a text and a chat as {' and '.join(kinds)}; needed: texts, or chats, for all of them."
        )


_FIX = "Mend the row or leave it out, or map another column with dataset.columns."


def _as_texts(rows: Any, name: str, where: Callable[[int], str]) -> Any:
    from datasets import Value

    missing = next((index for index, value in enumerate(rows[name]) if value is None), None)
    if missing is not None:
        raise RunError(f"{name} of {where(missing)} is missing. {_FIX}")
    return rows.cast_column(name, Value("string"))


def _check_text_or_chat(name: str, value: Any) -> str | None:
    if isinstance(value, str):
        return "needed: a text that is not blank." if name in _NOT_BLANK and not value.strip() else None
    if name in ("text", "answer") or not isinstance(value, list):
        return "needed: a text." if name in ("text", "answer") else "needed: a text, or a list of messages."
    return _check_chat(name, value)


def _check_chat(name: str, value: Any) -> str | None:
    if not isinstance(value, list) or not value:
        return "needed: a list of messages."
    for message in value:
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            return "needed: messages that have a role and content."
        content, more = message.get("content"), {k: v for k, v in message.items() if k not in ("role", "content")}
        # a call of a tool has no content of its own
        if not isinstance(content, (str, list)) and not any(v is not None for v in more.values()):
            return "needed: messages whose content is a text."
    return None


def _check_task(name: str, value: Any) -> str | None:
    return None if isinstance(value, (str, int)) and not isinstance(value, bool) else "needed: the name of a task."


def _check_rating(name: str, value: Any) -> str | None:
    return None if value in (True, False) else "needed: true or false."


def _check_class(name: str, value: Any) -> str | None:
    fits = isinstance(value, (int, str)) and str(value).strip()
    return None if fits else "needed: a class, as a text or a whole number."


def _is_filled(row: Mapping[str, Any]) -> bool:
    """Whether there is something to learn in a row."""
    value = row.get("completion", row.get("text", row.get("messages")))
    if value is None:  # preferences and answers, which were looked at one by one
        return True
    return bool(value.strip()) if isinstance(value, str) else any(message.get("content") for message in value)


def _short(value: Any) -> str:
    found = repr(value)
    return found if len(found) <= 80 else f"{found[:80]}..."
