"""Rows as lm-eval puts them to a model."""

from __future__ import annotations

from typing import Any


def right_request(task: Any, row: Any) -> tuple[str, str]:
    """The prompt of a row and its right answer, as lm-eval puts them together when it scores the row.

    Args:
        task: A task of lm-eval.
        row: One of its rows.
    """
    if task.OUTPUT_TYPE != "multiple_choice":
        return task.doc_to_text(row), str(task.doc_to_target(row))
    context = task.doc_to_choice(row) if task.multiple_input else task.doc_to_text(row)
    requests = task.construct_requests(row, context, metadata=(task.config.task, 0, 1))
    gold = task.doc_to_text(row) if task.multiple_input else task.doc_to_target(row)
    prompt, answer = requests[gold].args
    return prompt, answer
