"""The harness' own prompts, where a template cannot say them; equal to those of lm-eval's tasks."""

from __future__ import annotations

import re
from typing import Any


def hellaswag_rows(rows: Any) -> Any:
    """Add `query`, `choices` and `gold` to HellaSwag's rows, free of WikiHow's brackets."""

    def add(row: dict[str, Any]) -> dict[str, Any]:
        context = f"{row['ctx_a']} {row['ctx_b'].capitalize()}"
        return {
            "query": _without_brackets(f"{row['activity_label']}: {context}"),
            "choices": [_without_brackets(ending) for ending in row["endings"]],
            "gold": int(row["label"]),
        }

    return rows.map(add, desc=None)


def _without_brackets(text: str) -> str:
    text = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", text).replace("  ", " ")


def winogrande_gold(row: dict[str, Any]) -> int:
    """Which beginning is right: lm-eval takes a number here for a task whose choices are contexts."""
    return {"1": 0, "2": 1}[row["answer"]]


def winogrande_ending(row: dict[str, Any]) -> str:
    """What follows the blank, whose likelihood is scored after each beginning."""
    return str(row["sentence"]).split("_", 1)[1].strip()


def winogrande_beginnings(row: dict[str, Any]) -> list[str]:
    """The sentence up to and including the blank, filled in with either option."""
    before = str(row["sentence"]).split("_", 1)[0]
    return [before + row["option1"], before + row["option2"]]
