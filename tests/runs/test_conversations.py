from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from moelora.errors import RunError
from moelora.runs.config import DatasetConfig
from moelora.runs.data import load_rows
from tests.runs.tiny import tiny_tokenizer

CHAT = [
    {"from": "system", "value": "Be brief."},
    {"from": "human", "value": "1 + 1?"},
    {"from": "gpt", "value": "2"},
]


def rows(folder: Path, *conversations: Any) -> Any:
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps({"id": 1, "conversations": each}) + "\n" for each in conversations))
    config = DatasetConfig(files=str(file), columns={"messages": "conversations"})
    return load_rows(config, tiny_tokenizer())


def test_sharegpt_conversations_become_messages(tmp_path: Path) -> None:
    found = rows(tmp_path, CHAT, CHAT[1:])
    assert sorted((row["messages"] for row in found), key=len) == [
        [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "1 + 1?"},
            {"role": "assistant", "content": "2"},
        ],
    ]
    text = tiny_tokenizer().apply_chat_template(max(found["messages"], key=len), tokenize=False)
    assert text == "<|system|>Be brief.<|end|><|user|>1 + 1?<|end|><|assistant|>2<|end|>"


def test_messages_with_roles_stay_as_they_are(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi", "name": "Ann"}, {"role": "assistant", "content": "ho", "name": None}]
    assert rows(tmp_path, messages)[0] == {"messages": messages}


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (
            [*CHAT, {"from": "bing", "value": "3"}],
            r"message 4 of row 2 of dataset '.*rows.jsonl' is from 'bing', which is no known role; allowed: system",
        ),
        (
            [{"speaker": "human", "text": "hi"}],
            r"message 1 of row 2 of .* has the keys .*speaker.*; needed: each with role",
        ),
        ([], r"row 2 of .* is \[\]; needed: a list of messages"),
        (None, r"row 2 of .* is None; needed: a list of messages"),
    ],
)
def test_what_is_no_conversation_is_named_with_its_row(tmp_path: Path, conversation: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        rows(tmp_path, CHAT, conversation)
