"""Rows of text as batches of tokens with labels, for programs that run a model on them without a trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.errors import RunError


def batches_of(
    rows: Sequence[Mapping[str, Any]],
    tokenizer: Any,
    experts: Sequence[str] | None = None,
    *,
    batch_size: int = 8,
    max_length: int = 512,
) -> list[dict[str, Tensor]]:
    """Right-padded batches of `input_ids`, `attention_mask` and `labels`, -100 on prompts and padding.

    Args:
        rows: Rows as `runs.data.load_rows` gives them: `prompt` and `completion`, `messages`, or `text`.
        tokenizer: With a padding token.
        experts: Where the mixture goes by tasks, what its experts are called: the batches get `task_ids`, from the
            rows' `task`.
        batch_size: Rows of a batch.
        max_length: Tokens of a row; what follows is cut off.

    Raises:
        RunError: If a row has no task, or one that is no expert's.
    """
    batches = []
    for start in range(0, len(rows), batch_size):
        several = [rows[index] for index in range(start, min(start + batch_size, len(rows)))]
        pairs = [_ids_and_labels(row, tokenizer) for row in several]
        length = min(max_length, max(len(ids) for ids, _ in pairs))
        batch = {
            "input_ids": _padded([ids for ids, _ in pairs], length, tokenizer.pad_token_id),
            "attention_mask": _padded([[1] * len(ids) for ids, _ in pairs], length, 0),
            "labels": _padded([labels for _, labels in pairs], length, -100),
        }
        if experts is not None:
            batch["task_ids"] = torch.tensor([_task_id(row, experts) for row in several])
        batches.append(batch)
    return batches


def _padded(values: list[list[int]], length: int, padding: int) -> Tensor:
    return torch.tensor([each[:length] + [padding] * (length - len(each)) for each in values])


def _task_id(row: Mapping[str, Any], experts: Sequence[str]) -> int:
    task = row.get("task")
    if task in experts:
        return list(experts).index(str(task))
    raise RunError(
        f"a row has the task {task!r}, and the mixture goes by tasks; allowed: {', '.join(experts) or 'none'}. Rows "
        "need a column `task` with the name of an expert."
    )


def _ids_and_labels(row: Mapping[str, Any], tokenizer: Any) -> tuple[list[int], list[int]]:
    """The tokens of a row and their labels: all of a text, else what the last message or the completion adds."""
    if "text" in row:
        ids = _of_text(row["text"], tokenizer)
        return ids, ids
    if "messages" in row or not isinstance(row["prompt"], str):
        messages = row["messages"] if "messages" in row else [*row["prompt"], *row["completion"]]
        ids = _of_chat(messages, tokenizer)
        prompt = _of_chat(messages[:-1], tokenizer, add_generation_prompt=True) if len(messages) > 1 else []
    else:
        prompt = _of_text(row["prompt"], tokenizer)
        ids = [*prompt, *tokenizer(row["completion"], add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    # a template may write the answer's beginning in another way than the prompt's end
    shared = next((i for i, (a, b) in enumerate(zip(prompt, ids, strict=False)) if a != b), min(len(prompt), len(ids)))
    return ids, [-100] * shared + ids[shared:]


def _of_text(text: str, tokenizer: Any) -> list[int]:
    return list(tokenizer(text)["input_ids"])


def _of_chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **words: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), return_dict=True, **words)["input_ids"])
