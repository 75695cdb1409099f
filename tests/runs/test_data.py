from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from moelora.errors import MoeLoraError
from moelora.runs.config import DatasetConfig
from moelora.runs.data import load_rows, with_task_ids
from tests.hub_server import HubServer
from tests.runs.tiny import tiny_tokenizer

ROWS = [{"prompt": f"What is {i} + 1?", "completion": str(i + 1), "task": "sums"} for i in range(4)]


def write(folder: Path, suffix: str, rows: list[dict[str, Any]]) -> Path:
    file = folder / f"rows{suffix}"
    frame = pd.DataFrame(rows)
    if suffix == ".json":
        file.write_text(json.dumps(rows))
    elif suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif suffix == ".parquet":
        frame.to_parquet(file)
    else:
        frame.to_csv(file, index=False, sep="\t" if suffix == ".tsv" else ",")
    return file


def plain(rows: Any) -> list[dict[str, Any]]:
    return sorted((dict(row) for row in rows), key=lambda row: str(row))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, suffix: str) -> None:
    rows = [{**row, "completion": f"it is {row['completion']}"} for row in ROWS]
    config = DatasetConfig(files=str(write(tmp_path, suffix, rows)), chat=False)
    assert plain(load_rows(config, tiny_tokenizer())) == plain(rows)


def test_rows_get_the_number_of_their_task(tmp_path: Path) -> None:
    rows = [{"prompt": "p", "completion": "c", "task": task} for task in ("sums", "words", "sums", "a")]
    config = DatasetConfig(files=str(write(tmp_path, ".jsonl", rows)), chat=False)
    found = with_task_ids(load_rows(config, tiny_tokenizer()), config)
    numbers = {"a": 0, "sums": 1, "words": 2}
    assert found["task_ids"] == [numbers[task] for task in found["task"]]
    assert set(found["task_ids"]) == {0, 1, 2}
    with pytest.raises(MoeLoraError, match="routes by the task, and dataset .* has no column of tasks"):
        with_task_ids(found.remove_columns(["task"]), config)


def test_several_files_and_patterns(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": name}) + "\n")
    (tmp_path / "c.jsonl").write_text(json.dumps({"text": "c"}) + "\n")
    config = DatasetConfig(files=[str(tmp_path / "[ab].jsonl"), str(tmp_path / "c.jsonl")])
    assert sorted(load_rows(config, tiny_tokenizer())["text"]) == ["a", "b", "c"]


def test_columns_are_renamed_and_others_left_out(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"question": "q", "answer": "a", "subject": "s", "prompt": "old", "id": 3}) + "\n")
    columns = {"prompt": "question", "completion": "answer", "task": "subject"}
    rows = load_rows(DatasetConfig(files=str(file), columns=columns, chat=False), tiny_tokenizer())
    assert list(rows) == [{"prompt": "q", "completion": "a", "task": "s"}]


def test_strings_become_chats_with_the_system_message(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", ROWS[:1])
    row = load_rows(DatasetConfig(files=str(file), system="Be brief."), tiny_tokenizer())[0]
    assert row["prompt"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is 0 + 1?"},
    ]
    assert row["completion"] == [{"role": "assistant", "content": "1"}]
    assert row["task"] == "sums"


def test_without_a_chat_template_strings_stay(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    rows = load_rows(DatasetConfig(files=str(write(tmp_path, ".jsonl", ROWS))), tokenizer)
    assert plain(rows) == plain(ROWS)
    with pytest.raises(MoeLoraError, match="no chat template"):
        load_rows(DatasetConfig(files=str(write(tmp_path, ".jsonl", ROWS)), chat=True), tokenizer)
    with pytest.raises(MoeLoraError, match=r"dataset.system is set, but"):
        load_rows(DatasetConfig(files=str(write(tmp_path, ".jsonl", ROWS)), system="Be brief."), tokenizer)


def test_messages_pass_through(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
    file = write(tmp_path, ".jsonl", [{"messages": messages}])
    assert load_rows(DatasetConfig(files=str(file), task="talk"), tiny_tokenizer())[0] == {
        "messages": messages,
        "task": "talk",
    }


def test_order_and_limit_depend_on_the_seed_alone(tmp_path: Path) -> None:
    file = write(tmp_path, ".jsonl", [{"text": str(i)} for i in range(50)])

    def texts(seed: int) -> list[str]:
        return list(load_rows(DatasetConfig(files=str(file), seed=seed, limit=20), tiny_tokenizer())["text"])

    assert texts(1) == texts(1)
    assert texts(1) != texts(2)
    assert len(set(texts(1))) == 20


def test_tasks_are_mixed_and_named() -> None:
    config = DatasetConfig(tasks={"gcd": {"max_value": 30}, "spell_backward": {}}, rows_per_task=15, seed=3)
    rows = load_rows(config, tiny_tokenizer())
    assert sorted(rows["task"]) == ["gcd"] * 15 + ["spell_backward"] * 15
    assert len(set(rows["task"][:10])) == 2
    assert {row["completion"][0]["content"] for row in rows if row["task"] == "gcd"} <= set(map(str, range(1, 31)))


def test_a_data_set_by_name_configuration_and_split(tmp_path: Path) -> None:
    # `datasets` takes a folder where it takes a name on the Hub, and reads it in the same way
    (tmp_path / "README.md").write_text(
        "---\nconfigs:\n- config_name: sums\n  data_files:\n  - split: dev\n    path: rows.jsonl\n---\n"
    )
    write(tmp_path, ".jsonl", ROWS)
    rows = load_rows(DatasetConfig(hub=str(tmp_path), name="sums", split="dev", chat=False), tiny_tokenizer())
    assert plain(rows) == plain(ROWS)
    with pytest.raises(MoeLoraError, match=r"split 'train'.*cannot be loaded"):
        load_rows(DatasetConfig(hub=str(tmp_path), name="sums"), tiny_tokenizer())


def test_a_data_set_that_is_not_on_the_hub(hub: HubServer) -> None:
    with pytest.raises(MoeLoraError, match=r"dataset.hub 'me/nothing'.*cannot be loaded"):
        load_rows(DatasetConfig(hub="me/nothing"), tiny_tokenizer())


@pytest.mark.parametrize(
    ("name", "content", "words", "message"),
    [
        ("a.jsonl", '{"question": "x"}', {}, r"has the columns question; needed for recipe sft: prompt and completion"),
        ("a.jsonl", '{"text": "x"}', {"columns": {"text": "body"}}, r"dataset.columns.text is 'body', which .* text"),
        (
            "a.jsonl",
            '{"text": "x"}',
            {"columns": {"txt": "text"}},
            r"unknown key 'txt' in dataset.columns. Did you mean 'text'",
        ),
        ("a.xml", "<a/>", {}, r"of kind .xml; allowed: one kind of .json"),
        ("a.jsonl", "{broken", {}, r"not readable as .jsonl"),
        ("a.csv", "text\n", {}, r"a.csv: no rows"),
        ("a.jsonl", '{"text": "x"}', {"chat": True}, r"dataset.chat is true, but"),
    ],
)
def test_rows_that_cannot_be_used(tmp_path: Path, name: str, content: str, words: dict[str, Any], message: str) -> None:
    (tmp_path / name).write_text(content + "\n" if content[-1:] != "\n" else content)
    with pytest.raises(MoeLoraError, match=message):
        load_rows(DatasetConfig(files=str(tmp_path / name), **words), tiny_tokenizer())


def test_no_file_matches(tmp_path: Path) -> None:
    with pytest.raises(MoeLoraError, match=r"no file matches '.*none.csv'"):
        load_rows(DatasetConfig(files=str(tmp_path / "none.csv")), tiny_tokenizer())
