"""Rows as batches of tokens."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.errors import RunError
from moelora.runs.tokens import batches_of
from tests.runs.tiny import tiny_tokenizer

IDS = tiny_tokenizer()


def text_of(ids: Any) -> str:
    return str(IDS.decode(ids))


def labelled(batch: Any, row: int) -> str:
    """The text that a row's labels are of, behind its unlabelled beginning."""
    labels = batch["labels"][row]
    chosen = labels != -100
    assert (labels[chosen] == batch["input_ids"][row][chosen]).all()
    return text_of(batch["input_ids"][row][chosen])


CHAT = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "cd"}]


@pytest.mark.parametrize(
    ("row", "whole", "answer"),
    [
        ({"text": "abc"}, "abc", "abc"),
        ({"prompt": "ab", "completion": "cd"}, "abcd<|end|>", "cd<|end|>"),
        ({"messages": CHAT}, "<|user|>ab<|end|><|assistant|>cd<|end|>", "cd<|end|>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, "<|user|>ab<|end|><|assistant|>cd<|end|>", "cd<|end|>"),
        ({"messages": CHAT[:1]}, "<|user|>ab<|end|>", "<|user|>ab<|end|>"),
    ],
)
def test_labels_are_of_what_follows_the_prompt(row: dict[str, Any], whole: str, answer: str) -> None:
    (batch,) = batches_of([row], IDS)
    assert text_of(batch["input_ids"][0]) == whole
    assert labelled(batch, 0) == answer


def test_rows_are_padded_and_cut() -> None:
    first, second = batches_of([{"text": "a"}, {"text": "abcdef"}, {"text": "xy"}], IDS, batch_size=2, max_length=4)
    assert first["attention_mask"].tolist() == [[1, 0, 0, 0], [1, 1, 1, 1]]
    assert first["labels"][0].tolist()[1:] == [-100] * 3
    assert first["input_ids"][0].tolist()[1:] == [IDS.pad_token_id] * 3
    assert (labelled(first, 1), labelled(second, 0)) == ("abcd", "xy")


def test_tasks_are_the_numbers_of_experts() -> None:
    rows = [{"text": "a", "task": "code"}, {"text": "b", "task": "maths"}]
    (batch,) = batches_of(rows, IDS, ["maths", "code"])
    assert batch["task_ids"].tolist() == [1, 0]
    with pytest.raises(RunError, match="has the task 'law', .* allowed: maths, code"):
        batches_of([{"text": "a", "task": "law"}], IDS, ["maths", "code"])
    with pytest.raises(RunError, match="the task None"):
        batches_of([{"text": "a"}], IDS, ["maths", "code"])
