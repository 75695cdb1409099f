"""Rows as tokens: the prompt and the answer of each, as TRL's trainer would see them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.errors import ComposeError


def tokenize(rows: Iterable[Mapping[str, Any]], tokenizer: Any) -> list[dict[str, list[int]]]:
    """Token ids of rows, with labels where a row has an answer.

    Args:
        rows: Each has `prompt`, with `completion` or without; or `messages`, of which the last is the answer; or
            `text`. Prompts and completions are texts, or messages.
        tokenizer: The base model's tokenizer.

    Returns:
        `input_ids`, and where there is an answer `labels`, -100 for the prompt. All of a `text`, and of `messages` of
        one message, is an answer.

    Raises:
        ComposeError: For a row of another form.
    """
    return [_tokenize(row, tokenizer, f"row {number}") for number, row in enumerate(rows, 1)]


def _tokenize(row: Mapping[str, Any], tokenizer: Any, where: str) -> dict[str, list[int]]:
    prompt, completion = row.get("prompt"), row.get("completion")
    if prompt is None and isinstance(row.get("messages"), Sequence) and row["messages"]:
        prompt, completion = list(row["messages"][:-1]), [row["messages"][-1]]
        if not prompt:
            ids = list(tokenizer.apply_chat_template(completion, tokenize=True, return_dict=False))
            return {"input_ids": ids, "labels": ids}
    if isinstance(prompt, str) and isinstance(completion, str | None):
        before = tokenizer(prompt)["input_ids"]
        whole = before if completion is None else tokenizer(prompt + completion)["input_ids"]
        if completion is not None and tokenizer.eos_token_id is not None:
            whole = [*whole, tokenizer.eos_token_id]
    elif isinstance(prompt, Sequence) and not isinstance(prompt, str) and not isinstance(completion, str):
        words: dict[str, Any] = {"tokenize": True, "return_dict": False}
        before = tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True, **words)
        whole = before if completion is None else tokenizer.apply_chat_template([*prompt, *completion], **words)
    elif isinstance(row.get("text"), str):
        ids = list(tokenizer(row["text"])["input_ids"])
        return {"input_ids": ids, "labels": ids}
    else:
        raise ComposeError(
            f"{where} has the columns {', '.join(row)}; allowed: prompt (with completion), messages, or text, all "
            "texts or all messages."
        )
    if completion is None:
        return {"input_ids": whole}
    # a template may write the end of a prompt differently once an answer follows
    shared = next(
        (i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), min(len(before), len(whole))
    )
    return {"input_ids": whole, "labels": [-100] * shared + list(whole[shared:])}


def turn_start(tokenizer: Any) -> list[int]:
    """Token ids that open each turn of the user in a tokenizer's chat template, as `CentroidScores` takes them.

    They are what two turns of a short conversation have in common before their words, with a system prompt and without.

    Args:
        tokenizer: The base model's tokenizer.

    Returns:
        The ids, without blanks at their end, which a tokenizer may join with the words that follow. Empty if there is
        no chat template, or turns of the user begin with nothing of their own in it.
    """
    if getattr(tokenizer, "chat_template", None) is None:
        return []
    from jinja2.exceptions import TemplateError

    found: list[list[int]] = []
    turns = [("user", "Alpha"), ("assistant", "Beta"), ("user", "Gamma")]
    for head in ([], [("system", "Delta")]):
        messages = [{"role": role, "content": text} for role, text in [*head, *turns]]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except TemplateError:
            continue  # many templates refuse a system prompt
        first, rest = text.partition("Alpha")[::2]
        second, last = rest.partition("Beta")[2].partition("Gamma")[:2]
        if last:
            found += [tokenizer(part.rstrip(), add_special_tokens=False)["input_ids"] for part in (first, second)]
    shared: list[int] = []
    for tokens in zip(*map(reversed, found), strict=False):
        if len(set(tokens)) > 1:
            break
        shared.insert(0, tokens[0])
    return shared


def check_rows(rows: Any, name: str, vocab_size: int) -> None:
    """Refuse rows that are not tokenised, or by another tokenizer than the base model's.

    Args:
        rows: What should be tokenised rows.
        name: What the message calls them.
        vocab_size: Words that the base model has an embedding of.

    Raises:
        ComposeError: With the first row that is wrong, and its value.
    """
    if not isinstance(rows, Sequence) or isinstance(rows, str):
        raise ComposeError(f"the rows of {name} are a {type(rows).__name__}; allowed: a list of tokenised rows. {_FIX}")
    for number, row in enumerate(rows, 1):
        where = f"row {number} of {name}"
        if not isinstance(row, Mapping):
            raise ComposeError(f"{where} is {_short(row)}; allowed: a dict with input_ids. {_FIX}")
        lengths = {}
        for column in ("input_ids", "labels") if row.get("labels") is not None else ("input_ids",):
            given = row.get(column)
            try:
                ids = torch.as_tensor([] if given is None else given)
            except (TypeError, ValueError, RuntimeError) as error:
                raise ComposeError(f"{where} has {column} {_short(given)}; allowed: token ids. {_FIX}") from error
            if ids.dim() != 1 or len(ids) == 0 or ids.is_floating_point() or ids.dtype == torch.bool:
                raise ComposeError(
                    f"{where} has {column} {_short(given)}; allowed: a list of at least one token id. {_FIX}"
                )
            wrong = ids[((ids < 0) | (ids >= vocab_size)) & ((ids != -100) | (column == "input_ids"))]
            if len(wrong):
                raise ComposeError(
                    f"{where} has the token {int(wrong[0])} in {column}; allowed: 0 to {vocab_size - 1}, the base "
                    "model's vocabulary. Tokenise the rows with the base model's own tokenizer."
                )
            lengths[column] = len(ids)
        if len(set(lengths.values())) > 1:
            raise ComposeError(f"{where} has {lengths} entries; allowed: a label for each token. {_FIX}")


_FIX = "`moelora.compose.tokens.tokenize` makes such rows."


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def batches(examples: Sequence[Mapping[str, Sequence[int]]], size: int, device: Any) -> Iterator[dict[str, Tensor]]:
    """Examples in padded batches: `input_ids`, `attention_mask` and `labels`.

    Args:
        examples: Tokenised rows.
        size: Rows of a batch.
        device: Where the batches go.
    """
    for start in range(0, len(examples), size):
        part = examples[start : start + size]
        longest = max(len(example["input_ids"]) for example in part)
        columns: dict[str, list[list[int]]] = {"input_ids": [], "attention_mask": [], "labels": []}
        for example in part:
            ids = list(example["input_ids"])
            padding = longest - len(ids)
            columns["input_ids"].append(ids + [0] * padding)
            columns["attention_mask"].append([1] * len(ids) + [0] * padding)
            columns["labels"].append(list(example.get("labels") or [-100] * len(ids)) + [-100] * padding)
        yield {name: torch.tensor(values, device=device) for name, values in columns.items()}
