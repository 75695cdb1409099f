"""LLM-Adapters' prompts, targets and regular expressions (`commonsense_evaluate.py`).

The prompt is the evaluation's, byte for byte, with its sixteen spaces. The authors train with a slightly different one
(`TRAINING_PROMPT`); numbers from here never use that. A test pins both by their hashes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

Row = dict[str, Any]

_INDENT = " " * 16
PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request. \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n\n{_INDENT}### Response:\n{_INDENT}"
)
TRAINING_PROMPT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.  \n\n"
    f"{_INDENT}### Instruction:\n{_INDENT}{{instruction}}\n{_INDENT}\n{_INDENT}### Response:\n{_INDENT}{{output}}"
)


def prompt(instruction: str) -> str:
    """The evaluation's prompt of an instruction."""
    return PROMPT.replace("{instruction}", instruction)


def _numbered(word: str, options: Sequence[str], between: str = " ") -> str:
    return between.join(f"{word.capitalize()}{index}: {option}" for index, option in enumerate(options, 1))


def _format(word: str, count: int) -> str:
    return "Answer format: " + "/".join(f"{word}{index}" for index in range(1, count + 1))


def _choose(question: str, options: Sequence[str]) -> str:
    return prompt(
        f"Please choose the correct answer to the question: {question}\n\n"
        f"{_numbered('answer', options)}\n\n{_format('answer', len(options))}"
    )


def arc(row: Row) -> str:
    """ARC-Easy and ARC-Challenge."""
    return _choose(row["question"], row["choices"]["text"])


def openbookqa(row: Row) -> str:
    """OpenBookQA."""
    return _choose(row["question_stem"], row["choices"]["text"])


def social_i_qa(row: Row) -> str:
    """SocialIQA."""
    return _choose(f"{row['context']} {row['question']}", [row["answerA"], row["answerB"], row["answerC"]])


def boolq(row: Row) -> str:
    """BoolQ, without its passage."""
    return prompt(
        f"Please answer the following question with true or false, question: {row['question']}?\n\n"
        "Answer format: true/false"
    )


def piqa(row: Row) -> str:
    """PIQA."""
    solutions = _numbered("solution", [row["sol1"], row["sol2"]], between="\n\n")
    return prompt(
        f"Please choose the correct solution to the question: {row['goal']}\n\n{solutions}\n\n{_format('solution', 2)}"
    )


def hellaswag(row: Row) -> str:
    """HellaSwag; the authors' file of it was not at hand, the form is that of outputs others have published."""
    return prompt(
        f"Please choose the correct ending to complete the given sentence: {row['activity_label']}: {row['ctx']}\n\n"
        f"{_numbered('ending', row['endings'])}\n\n{_format('ending', 4)}"
    )


def winogrande(row: Row) -> str:
    """WinoGrande, whose answer format follows on the line of the options."""
    return prompt(
        "Please choose the correct answer to fill in the blank to complete the given sentence: "
        f"{row['sentence']}\n\n{_numbered('option', [row['option1'], row['option2']])} {_format('option', 2)}"
    )


def _arc_answer(row: Row) -> str:
    return f"answer{row['choices']['label'].index(row['answerKey'].strip()) + 1}"


_ANSWERS: dict[str, tuple[Callable[[Row], str], re.Pattern[str]]] = {
    "arc": (_arc_answer, re.compile("answer1|answer2|answer3|answer4|answer5")),
    "openbookqa": (_arc_answer, re.compile("answer1|answer2|answer3|answer4|answer5")),
    "social_i_qa": (
        lambda row: f"answer{row['label'].strip()}",
        re.compile("answer1|answer2|answer3|answer4|answer5"),
    ),
    "boolq": (lambda row: "true" if row["answer"] else "false", re.compile("true|false")),
    "piqa": (lambda row: f"solution{int(row['label']) + 1}", re.compile("solution1|solution2")),
    "hellaswag": (lambda row: f"ending{int(row['label']) + 1}", re.compile("ending1|ending2|ending3|ending4")),
    "winogrande": (lambda row: f"option{row['answer']}", re.compile("option1|option2")),
}


def score(task: str, row: Row, generated: str) -> dict[str, float]:
    """Whether the first answer that a text names is right, and whether it names none."""
    answer, pattern = _ANSWERS[task]
    found = pattern.search(generated)
    return {"acc": float(found is not None and found[0] == answer(row)), "unparsable": float(found is None)}


def _target(task: str) -> Callable[[Row], str]:
    return lambda row: f"the correct answer is {_ANSWERS[task][0](row)}"


def _score(task: str) -> Callable[[Row, Sequence[str]], dict[str, float]]:
    return lambda row, results: score(task, row, results[0])


arc_target, arc_score = _target("arc"), _score("arc")
openbookqa_target, openbookqa_score = _target("openbookqa"), _score("openbookqa")
social_i_qa_target, social_i_qa_score = _target("social_i_qa"), _score("social_i_qa")
boolq_target, boolq_score = _target("boolq"), _score("boolq")
piqa_target, piqa_score = _target("piqa"), _score("piqa")
hellaswag_target, hellaswag_score = _target("hellaswag"), _score("hellaswag")
winogrande_target, winogrande_score = _target("winogrande"), _score("winogrande")
