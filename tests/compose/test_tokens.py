"""Rows as tokens with labels."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.compose.tokens import batches, tokenize
from moelora.errors import ComposeError
from moelora.routing.prompts import prompt_of
from tests.runs.tiny import tiny_tokenizer

IDS = tiny_tokenizer()
CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


def text_of(ids: Any) -> str:
    return str(IDS.decode(ids))


@pytest.mark.parametrize(
    ("row", "whole", "answer"),
    [
        ({"text": "abc"}, "abc", "abc"),
        ({"prompt": "ab", "completion": "cd"}, "abcd<|end|>", "cd<|end|>"),
        ({"prompt": "ab"}, "ab", ""),
        ({"messages": CHAT}, "<|user|>ab<|end|><|assistant|>cd<|end|>", "cd<|end|>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "<|user|>ab<|end|><|assistant|>cd<|end|>", "cd<|end|>"),
        ({"prompt": CHAT[:1]}, "<|user|>ab<|end|><|assistant|>", ""),
        ({"messages": CHAT[:1]}, "<|user|>ab<|end|>", "<|user|>ab<|end|>"),
    ],
)
def test_labels_are_of_what_follows_the_prompt(row: dict[str, Any], whole: str, answer: str) -> None:
    (example,) = tokenize([row], IDS)
    assert text_of(example["input_ids"]) == whole
    assert text_of([label for label in example.get("labels", []) if label != -100]) == answer
    assert text_of(prompt_of(example)) == (whole if whole == answer else whole.removesuffix(answer))


def test_rows_are_padded() -> None:
    rows = tokenize([{"text": "a"}, {"text": "abcd"}, {"text": "xy"}], IDS)
    first, second = batches(rows, 2, "cpu")
    assert first["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert first["labels"][0].tolist()[1:] == [-100] * 3
    assert second["input_ids"].shape == (1, 2)


@pytest.mark.parametrize("row", [{"question": "a"}, {"prompt": "a", "completion": CHAT}, {"messages": []}])
def test_other_rows_are_refused(row: dict[str, Any]) -> None:
    with pytest.raises(ComposeError, match="row 2 has the columns .*; allowed: prompt"):
        tokenize([{"text": "a"}, row], IDS)
