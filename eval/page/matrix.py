"""Tables of numbers with a tint: the number is always there, the tint only helps to find it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]
# The colours of the two ends, and how strong they get: a text is readable on them on light and on dark paper.
_GOOD, _BAD, _STRONGEST = "11, 95, 165", "176, 60, 0", 0.55


def tint(value: float, limit: float) -> str:
    """The colour of a value: blue above 0, orange below, strongest at `limit`."""
    strength = _STRONGEST * min(abs(value) / limit, 1.0) if limit else 0.0
    return f"rgba({_GOOD if value > 0 else _BAD}, {strength:.2f})"


def matrix(
    title: str, note: str, columns: list[str], rows: Mapping[str, list[tuple[str, float]]], limit: float
) -> Json:
    """A table as the page shows it.

    Args:
        title: First words of its caption.
        note: The rest of it.
        columns: Names of the columns.
        rows: Name of a row to the text and the value of each cell.
        limit: The value, in size, where the colour is strongest.
    """
    return {
        "title": title,
        "note": note,
        "columns": columns,
        "rows": [
            {"name": name, "cells": [{"text": text, "color": tint(value, limit)} for text, value in cells]}
            for name, cells in rows.items()
        ],
    }
