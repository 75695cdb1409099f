"""Rows of the eight commonsense tasks, written for the tests, in the form of a folder for MOELORA_DATA_DIR."""

from __future__ import annotations

import gzip
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

THINGS = ("stone", "river", "lamp", "bread", "wheel", "cloud", "ladder", "spoon")


def _choices(index: int) -> dict[str, list[str]]:
    texts = [f"the {THINGS[(index + step) % len(THINGS)]}{'.' * step}" for step in range(4)]
    # one row has figures for labels, one three choices
    labels = ["1", "2", "3", "4"] if index == 1 else ["A", "B", "C", "D"]
    count = 3 if index == 2 else 4
    return {"text": texts[:count], "label": labels[:count]}


def _arc(index: int) -> dict[str, Any]:
    choices = _choices(index)
    return {
        "id": str(index),
        "question": f"Which of {index + 2} things is a {THINGS[index % 8]}?",
        "choices": choices,
        "answerKey": choices["label"][index % 3],
    }


def _openbookqa(index: int) -> dict[str, Any]:
    row = _arc(index)
    return {
        "id": row["id"],
        "question_stem": f"A {THINGS[index % 8]} is made by",
        "choices": row["choices"],
        "answerKey": row["answerKey"],
    }


def _boolq(index: int) -> dict[str, Any]:
    thing = THINGS[index % 8]
    # SuperGLUE puts a title before the passage, google/boolq does not
    title = f"The {thing} -- " if index < 100 else ""
    return {
        "question": f"is the {thing} heavy",
        "passage": f"{title}One {thing} weighs {index} pounds.",
        "answer": index % 3 > 0,
    }


def _social_i_qa(index: int) -> dict[str, Any]:
    return {
        "context": f"Kim lost a {THINGS[index % 8]}.",
        "question": "How would Kim feel?",
        "answerA": "sad",
        "answerB": f"{index} times glad",
        "answerC": "hungry for more",
        "label": str(index % 3 + 1),
    }


def _winogrande(index: int) -> dict[str, Any]:
    a, b = THINGS[index % 8], THINGS[(index + 3) % 8]
    return {
        "sentence": f"The {a} broke under the {b} because the _ was number {index}.",
        "option1": a,
        "option2": b,
        "answer": str(index % 2 + 1),
    }


def _piqa(index: int) -> dict[str, Any]:
    thing = THINGS[index % 8]
    return {
        "goal": f"clean a {thing}",
        "sol1": f"Wash the {thing}.",
        "sol2": f"Bury the {thing} {index} feet deep.",
        "label": index % 2,
    }


def _hellaswag(index: int) -> dict[str, Any]:
    thing = THINGS[index % 8]
    return {
        "ind": index,
        "activity_label": "Cleaning",
        "ctx_a": f"A man holds a {thing}. [title] Care",
        "ctx_b": "he",
        "ctx": f"A man holds a {thing}. [title] Care he",
        "endings": [f"drops the {thing}.", "[step] sings  aloud.", f"counts to {index}.", "leaves."],
        "label": str(index % 4),
    }


TASKS = {
    "arc_easy": (_arc, ("train", "validation", "test")),
    "arc_challenge": (_arc, ("train", "validation", "test")),
    "boolq": (_boolq, ("train", "validation")),
    "openbookqa": (_openbookqa, ("train", "validation", "test")),
    "social_i_qa": (_social_i_qa, ("train", "validation")),
    "winogrande": (_winogrande, ("train", "validation")),
    "piqa": (_piqa, ("validation",)),
    "hellaswag": (_hellaswag, ("validation",)),
}


def write_rows(folder: Path, rows: int = 6, train_rows: int = 24, tasks: Sequence[str] = tuple(TASKS)) -> Path:
    """A folder with so many rows of each split of each task; no two splits share a row."""
    for task in tasks:
        make, splits = TASKS[task]
        (folder / task).mkdir(parents=True, exist_ok=True)
        for number, split in enumerate(splits):
            count = train_rows if split == "train" else rows
            content = "".join(json.dumps(make(200 * number + index)) + "\n" for index in range(count))
            (folder / task / f"{split}.jsonl.gz").write_bytes(gzip.compress(content.encode()))
    return folder
