"""Checks of single rows: what a recipe's columns hold, before anything is trained on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from moelora.errors import RunError


def check_rows(rows: Any, columns: Sequence[str], recipe: str, where: Callable[[int, str], str]) -> None:
    """Refuse rows with a value that the recipe cannot train on.

    Args:
        rows: The rows; chats are messages of role and content already.
        columns: The columns to look at.
        recipe: The recipe.
        where: Names a row, by its index, and a column for the message of an error.

    Raises:
        RunError: If a text is missing or blank, a rating is neither true nor false, or a class is missing.
    """
    for column in columns:
        for index, value in enumerate(rows[column]):
            if wanted := _wanted(column, value, recipe):
                raise RunError(f"{where(index, column)} is {_short(value)}; needed: {wanted}.")


def _wanted(column: str, value: Any, recipe: str) -> str | None:
    """What should stand in place of a value, or None if it is right."""
    if column == "label" and recipe == "kto":
        return None if value in (True, False) else "true or false"
    if column == "label":
        fits = isinstance(value, int) or (isinstance(value, str) and value.strip())
        return None if fits else "a class, as a text or a whole number"
    if isinstance(value, list):  # of messages, which were looked at when they were converted
        return None
    return None if isinstance(value, str) and value.strip() else "a text that is not blank"


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
