"""Rows that are kept from training."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from moelora.errors import MoeLoraError, RunError
from moelora.runs.config import DatasetConfig, RunConfig, load_config
from moelora.runs.data import load_rows
from moelora.runs.folder import with_defaults
from moelora.runs.held_out import hold_out
from moelora.runs.schema import build
from tests.runs.tiny import tiny_tokenizer, write_run


def made(count: int = 40) -> list[dict[str, Any]]:
    return [{"prompt": f"{n} ", "completion": str(n + 1), "task": "abbb"[n % 4]} for n in range(count)]


def test_each_task_gives_its_share_and_no_prompt_is_in_both() -> None:
    rows = Dataset.from_list([*made(), *made(), {"prompt": "0 ", "completion": "other", "task": "b"}])
    trained, kept = hold_out(rows, 0.2, seed=3)
    held = [rows[index] for index in kept]
    assert sorted(row["task"] for row in held) == ["a"] * 2 + ["b"] * 6
    assert len({row["prompt"] for row in held}) == 8
    assert not {rows[index]["prompt"] for index in trained} & {row["prompt"] for row in held}
    # the second copies of what is held out are in neither part
    extra = sum(row["prompt"] == "0 " for row in held)
    assert len(trained) == len(rows) - 2 * 8 - extra


def test_the_choice_depends_on_prompts_and_seed_alone() -> None:
    rows, back = Dataset.from_list(made()), Dataset.from_list(made()[::-1])

    def prompts(rows: Dataset, seed: int) -> set[str]:
        return {rows[index]["prompt"] for index in hold_out(rows, 0.25, seed)[1]}

    assert prompts(rows, 0) == prompts(back, 0)
    assert prompts(rows, 0) != prompts(rows, 1)


def test_the_two_parts_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, made())))
    data = DatasetConfig(files=str(file), held_out=0.1)
    trained, held = (load_rows(data, tiny_tokenizer(), held_out=kept) for kept in (False, True))
    assert (len(trained), len(held)) == (36, 4)
    assert held[0]["prompt"][-1]["role"] == "user"
    # at least one prompt of a task, however small the share
    assert len(load_rows(DatasetConfig(files=str(file), held_out=0.001), tiny_tokenizer(), held_out=True)) == 2


def test_what_cannot_be_held_out(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"held_out is 0.5, and task 'a' has 1 different prompts"):
        hold_out(Dataset.from_list([*made(1), *made(1)]), 0.5, 0)
    for words, message in (
        (["dataset.held_out=1.5"], r"dataset.held_out is 1.5; allowed: a number of 0 to below 1"),
        (["dataset.held_out=0.1"], r"dataset.held_out is 0.1 with dataset.tasks; allowed: 0"),
        (["dataset={files: x, held_out: 0.1}", "recipe=dpo"], r"dataset.held_out is 0.1 with recipe 'dpo'; allowed: 0"),
    ):
        with pytest.raises(MoeLoraError, match=message):
            load_config(write_run(tmp_path), words)


def test_a_longer_chat_goes_where_the_shorter_one_goes() -> None:
    def turns(n: int, count: int) -> dict[str, Any]:
        return {"messages": [m for t in range(count) for m in (said("user", f"{n} {t}"), said("assistant", f"a{t}"))]}

    def said(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    rows = Dataset.from_list([turns(n, count) for n in range(20) for count in (1, 2)])
    trained, kept = hold_out(rows, 0.3, 0)
    first = {index: rows[index]["messages"][0]["content"] for index in range(len(rows))}
    assert len(kept) == 6
    assert not {first[index] for index in trained} & {first[index] for index in kept}


def test_a_task_whose_prompts_another_task_holds_out() -> None:
    rows = Dataset.from_list([*({"text": f"{n}", "task": "a"} for n in range(4)), {"text": "x", "task": "b"}] * 1)
    with pytest.raises(RunError, match="task 'b' has 1 different prompts"):
        hold_out(rows, 0.5, 0)
    both = Dataset.from_list([{"text": f"{n}", "task": task} for task in "ab" for n in range(4)])
    trained, kept = hold_out(both, 0.5, 0)
    assert (len(trained), len(kept)) == (4, 4)
    (index, other) = kept[:2]
    few = Dataset.from_list([*both, *({"text": both[i]["text"], "task": "c"} for i in (index, other))])
    with pytest.raises(RunError, match="all prompts of task 'c' are held out"):
        hold_out(few, 0.5, 0)


def test_a_run_from_before_the_key_existed_is_the_same_run() -> None:
    words = {"model": "m", "output_dir": "o", "dataset": {"files": "x"}, "adapter": {"preset": "lora"}}
    now = asdict(build(RunConfig, words, "the configuration"))
    del words["dataset"]
    old = {**now, "dataset": {name: value for name, value in now["dataset"].items() if name != "held_out"}}
    assert with_defaults(old) == now
    assert with_defaults({"unreadable": 1}) == {"unreadable": 1}
