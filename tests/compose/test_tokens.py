"""Rows as tokens with labels."""

from __future__ import annotations

from typing import Any

import pytest

from moelora.compose.tokens import batches, tokenize, turn_start
from moelora.errors import ComposeError
from moelora.routing.prompts import prompt_of
from tests.runs.tiny import TEMPLATE, tiny_tokenizer

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


SYSTEM_ONCE = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}" + TEMPLATE
TURNS_OF_WORDS = "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
NO_OPENING = "{% for message in messages %}{{ message['content'] }}<|end|>{% endfor %}"


@pytest.mark.parametrize(
    ("template", "opening"),
    [
        (TEMPLATE, "<|user|>"),
        (SYSTEM_ONCE, "<|user|>"),
        (TURNS_OF_WORDS, "user:"),  # the blank after it may be joined with what follows
        (NO_OPENING, ""),
        ("always the same", ""),
        (None, ""),
    ],
)
def test_what_opens_a_turn_is_read_off_the_template(template: str | None, opening: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    assert text_of(turn_start(tokenizer)) == opening


def test_the_opening_is_found_in_each_turn_of_a_conversation() -> None:
    opening = turn_start(IDS)
    turns = [*CHAT, {"role": "user", "content": "user"}]
    for head in ([], [{"role": "system", "content": "Be brief."}]):
        ids = tokenize([{"prompt": [*head, *turns]}], IDS)[0]["input_ids"]
        places = [i for i in range(len(ids)) if ids[i : i + len(opening)] == opening]
        assert len(places) == 2
