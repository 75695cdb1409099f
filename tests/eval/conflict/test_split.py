from __future__ import annotations

import itertools
from collections import Counter
from typing import Any

import pytest
from datasets import Dataset

from eval.conflict.split import at_random, split_rows
from moelora.errors import RunError


def rows(**counts: int) -> list[dict[str, Any]]:
    return [
        {"prompt": f"{task} {n}", "completion": str(n), "task": task}
        for task, count in counts.items()
        for n in range(count)
    ]


def prompts(part: dict[str, Any]) -> dict[str, set[str]]:
    return {task: set(own["prompt"]) for task, own in part.items()}


def test_every_row_has_one_use_and_shares_are_those_asked_for() -> None:
    split = split_rows(Dataset.from_list(rows(b=30, a=60)), 0.3, seed=0)
    assert list(split.train) == list(split.scored) == ["a", "b"]
    for task, counts in {"a": (42, 6, 12), "b": (21, 3, 6)}.items():
        parts = [prompts(part)[task] for part in (split.train, split.selection, split.scored)]
        assert tuple(map(len, parts)) == counts
        for one, other in itertools.combinations(parts, 2):
            assert not one & other
    assert split.dropped == 0
    again = split_rows(Dataset.from_list(rows(a=60, b=30)[::-1]), 0.3, seed=0)
    assert prompts(again.scored) == prompts(split.scored)
    assert prompts(split_rows(Dataset.from_list(rows(a=60, b=30)), 0.3, seed=1).scored) != prompts(split.scored)


def test_a_prompt_that_is_held_out_is_trained_on_nowhere() -> None:
    given = rows(a=40, b=30)
    given += [{**row, "task": "b"} for row in given[:40]]  # the prompts of a under another task
    given += [{**row, "completion": "again"} for row in given[:40]]  # and again
    split = split_rows(Dataset.from_list(given), 0.3, seed=0)
    trained = set().union(*prompts(split.train).values())
    for part in (split.selection, split.scored):
        for task, own in part.items():
            assert not set(own["prompt"]) & trained
            assert len(set(own["prompt"])) == len(own), task
    used = sum(len(own) for part in (split.train, split.selection, split.scored) for own in part.values())
    assert used + split.dropped == len(given)
    assert split.dropped > 0


def test_messages_are_told_apart_by_what_comes_before_the_answer() -> None:
    def message(role: str, content: str) -> dict[str, str]:
        return {"role": role, "content": content}

    given = [
        {"messages": [message("user", str(n // 2)), message("assistant", str(n % 2))], "task": task}
        for task in "ab"
        for n in range(60)
    ]
    split = split_rows(Dataset.from_list(given), 0.3, seed=0)
    held = {own["messages"][i][0]["content"] for own in split.scored.values() for i in range(len(own))}
    assert len(held) == 6  # the same six for both tasks, as their prompts are the same
    trained = {own["messages"][i][0]["content"] for own in split.train.values() for i in range(len(own))}
    assert not held & trained


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "do not say their task"),
        (rows(a=50), "all rows are of the task 'a'"),
        ([*rows(a=50), {"prompt": "x", "completion": "y", "task": None}], "has no task"),
        (rows(a=50, b=10), "'b' has 10 rows: 1 to choose learning rates, 2 to score, 7 to train"),
        ([*rows(a=50), *rows(b=1) * 50], "'b' has 50 rows: 0 to choose learning rates, 0 to score"),
    ],
)
def test_rows_that_do_not_do_are_refused(given: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RunError, match=message):
        split_rows(Dataset.from_list(given), 0.3, seed=0)


def test_random_parts_have_all_rows_and_the_tasks_sizes() -> None:
    train = split_rows(Dataset.from_list(rows(a=60, b=30)), 0.3, seed=0).train
    parts = at_random(train, seed=0)
    assert [len(part) for part in parts] == [len(own) for own in train.values()]
    everything = Counter(prompt for part in parts for prompt in part["prompt"])
    assert everything == Counter(prompt for own in train.values() for prompt in own["prompt"])
    assert all(len(set(part["task"])) == 2 for part in parts)
    assert parts[0]["prompt"] == at_random(train, seed=0)[0]["prompt"] != at_random(train, seed=1)[0]["prompt"]
