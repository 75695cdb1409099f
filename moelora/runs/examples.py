"""Rows as tokens with labels, and batches of them, for measuring a model outside a trainer."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

IGNORED = -100
"""The label of a token that is not learnt."""


def tokenised(rows: Iterable[Mapping[str, Any]], tokenizer: Any, max_length: int = 1024) -> list[dict[str, list[int]]]:
    """`input_ids` and `labels` of each row, as TRL's trainer makes them with its defaults.

    Labels are those of the completion; of `messages` and `text`, which have no prompt, those of all tokens.

    Args:
        rows: Rows as `load_rows` gives them.
        tokenizer: The model's.
        max_length: Longer rows are cut at their end.
    """
    return [_tokenised(row, tokenizer, max_length) for row in rows]


def _tokenised(row: Mapping[str, Any], tokenizer: Any, max_length: int) -> dict[str, list[int]]:
    start = 0
    if "prompt" in row and isinstance(row["prompt"], str):
        start = len(tokenizer(row["prompt"])["input_ids"])
        ids = tokenizer(row["prompt"] + row["completion"] + (tokenizer.eos_token or ""))["input_ids"]
    elif "prompt" in row:
        start = len(_chat(row["prompt"], tokenizer, add_generation_prompt=True))
        ids = _chat([*row["prompt"], *row["completion"]], tokenizer)
    elif "messages" in row:
        ids = _chat(row["messages"], tokenizer)
    else:
        ids = tokenizer(row["text"] + (tokenizer.eos_token or ""))["input_ids"]
    labels = [IGNORED] * start + list(ids[start:])
    return {"input_ids": list(ids[:max_length]), "labels": labels[:max_length]}


def _chat(messages: Sequence[Mapping[str, Any]], tokenizer: Any, **words: Any) -> list[int]:
    return list(tokenizer.apply_chat_template(list(messages), return_dict=True, **words)["input_ids"])


def padded(examples: Sequence[Mapping[str, Sequence[int]]], batch_size: int, pad_token_id: int) -> Iterator[Any]:
    """Batches of tensors, padded on the right: `input_ids`, `attention_mask`, `labels`.

    Args:
        examples: Tokenised rows.
        batch_size: Rows of a batch.
        pad_token_id: What to pad with.
    """
    import torch

    for start in range(0, len(examples), batch_size):
        rows = examples[start : start + batch_size]
        longest = max(len(row["input_ids"]) for row in rows)

        def fill(name: str, value: int, rows: Any = rows, longest: int = longest) -> Any:
            return torch.tensor([[*row[name], *[value] * (longest - len(row[name]))] for row in rows])

        lengths = torch.tensor([len(row["input_ids"]) for row in rows])
        yield {
            "input_ids": fill("input_ids", pad_token_id),
            "attention_mask": (torch.arange(longest) < lengths.unsqueeze(1)).long(),
            "labels": fill("labels", IGNORED),
        }
