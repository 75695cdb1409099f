"""MixLoRA's prompts, as in the authors' MoE-PEFT; the answer is the likeliest of the row's own letters.

There the argmax runs over the labels of the whole task (for ARC: 1, 2, 3, 4 and A to E at once), here over those that
the row has. BoolQ comes without its passage, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]


def _lines(options: Sequence[str]) -> str:
    return "".join(f"\n({letter}) {option}" for letter, option in zip("ABCD", options, strict=False))


def _in_line(question: str, row: Row) -> str:
    choices = row["choices"]
    options = "".join(f" ({label}) {text}" for label, text in zip(choices["label"], choices["text"], strict=True))
    return f"Please choose the correct answer to the question: {question}{options}\nAnswer:"


def arc(row: Row) -> str:
    """ARC-Easy and ARC-Challenge."""
    return _in_line(row["question"], row)


def openbookqa(row: Row) -> str:
    """OpenBookQA."""
    return _in_line(row["question_stem"], row)


def boolq(row: Row) -> str:
    """BoolQ."""
    return f"Please answer the following question with true or false: {row['question']}?\nAnswer:"


def piqa(row: Row) -> str:
    """PIQA."""
    return (
        "Below is a common task along with two possible solutions labeled (A) and (B). Please select the appropriate "
        f"solution to achieve the task:\n{row['goal']}\n{_lines([row['sol1'], row['sol2']])}\n\nCorrect solution:"
    )


def social_i_qa(row: Row) -> str:
    """SocialIQA."""
    return (
        f"Please choose the correct answer to the question.\nQuestion: {row['context']} {row['question']}"
        f"{_lines([row['answerA'], row['answerB'], row['answerC']])}\nAnswer:"
    )


def hellaswag(row: Row) -> str:
    """HellaSwag."""
    return (
        "Please choose the correct ending to complete the given sentence.\n"
        f"Sentence: {row['activity_label']}. {row['ctx']}{_lines(row['endings'])}\nAnswer:"
    )


def winogrande(row: Row) -> str:
    """WinoGrande."""
    return (
        "Please choose the correct answer to fill in the blank to complete the given sentence.\n"
        f"Sentence: {row['sentence']}{_lines([row['option1'], row['option2']])}\nAnswer:"
    )
