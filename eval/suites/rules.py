"""Tasks that contradict each other: questions of one form, for whose answers there are three rules.

The first word of a prompt says the rule ("red", "green", "blue"); the rest looks alike under all three. What is learnt
for one rule is wrong for the others, so that a low-rank update that all share has to tell them apart, and one for each
rule has not. `register` makes them ordinary tasks of reasoning-gym, named as "numbers_red";
`python -m eval.suites.rules --output rows.jsonl` writes rows whose task is the rule.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from moelora.files import write_atomically

RULES = ("red", "green", "blue")
"""The words that say which rule holds."""


@dataclass
class RuleConfig:
    """What reasoning-gym wants to make a data set.

    Args:
        seed: Problem i is made from `seed + i`.
        size: Number of problems.
    """

    seed: int | None = None
    size: int = 500


Parts = list[Any]


@dataclass(frozen=True)
class Form:
    """A form of question.

    Args:
        draw: Makes what a question is about.
        ask: Makes the question of it.
        answers: The answer under each of `RULES`.
    """

    draw: Callable[[Random], Parts]
    ask: Callable[[Parts], str]
    answers: tuple[Callable[[Parts], str], Callable[[Parts], str], Callable[[Parts], str]]


def _spaced(parts: Parts) -> str:
    return " ".join(map(str, parts))


@functools.cache
def _words() -> list[str]:
    """Words of four to seven small letters."""
    from reasoning_gym.data import read_data_file

    text = read_data_file("in_the_year_2889.txt")
    letters = set(string.ascii_lowercase)
    return sorted({word for word in text.split() if 4 <= len(word) <= 7 and set(word) <= letters})


FORMS: dict[str, Form] = {
    "numbers": Form(
        lambda rng: rng.sample(range(10, 100), 3),
        _spaced,
        (lambda x: str(max(x)), lambda x: str(min(x)), lambda x: str(sorted(x)[1])),
    ),
    "words": Form(
        lambda rng: rng.sample(_words(), 3),
        _spaced,
        (lambda x: x[0], lambda x: x[1], lambda x: x[2]),
    ),
    "letters": Form(
        lambda rng: rng.sample(string.ascii_lowercase, 4),
        _spaced,
        (lambda x: _spaced(sorted(x)), lambda x: _spaced(sorted(x)[::-1]), lambda x: _spaced(x[::-1])),
    ),
    "sums": Form(
        lambda rng: rng.sample(range(1, 21), 2),
        lambda x: f"{x[0]} and {x[1]}",
        (lambda x: str(x[0] + x[1]), lambda x: str(abs(x[0] - x[1])), lambda x: str(max(x))),
    ),
    "more": Form(
        lambda rng: rng.sample(range(10, 100), 2),
        lambda x: f"is {x[0]} more than {x[1]}",
        (
            lambda x: "yes" if x[0] > x[1] else "no",
            lambda x: "no" if x[0] > x[1] else "yes",
            lambda x: "left" if x[0] > x[1] else "right",
        ),
    ),
    "spelling": Form(
        lambda rng: [rng.choice(_words())],
        _spaced,
        (lambda x: x[0].upper(), lambda x: x[0].capitalize(), lambda x: x[0][0]),
    ),
    "ends": Form(
        lambda rng: [rng.choice(_words())],
        lambda x: f"letter of {x[0]}",
        (lambda x: x[0][-1], lambda x: x[0][0], lambda x: x[0][1]),
    ),
    "pairs": Form(
        lambda rng: rng.sample(range(1, 10), 4),
        lambda x: f"{x[0]}{x[1]} {x[2]}{x[3]}",
        (lambda x: f"{x[2]}{x[3]} {x[0]}{x[1]}", lambda x: f"{x[1]}{x[0]} {x[3]}{x[2]}", lambda x: f"{x[0]} {x[3]}"),
    ),
}
"""The forms by name."""

KEPT = ("ends", "pairs")
"""Forms kept for the end: nothing was chosen by looking at these two."""


def register() -> None:
    """Make the tasks known to reasoning-gym; where that is not installed, nothing."""
    if importlib.util.find_spec("reasoning_gym") is None:
        return
    from reasoning_gym.factory import DATASETS, register_dataset

    for name, form in FORMS.items():
        for number, rule in enumerate(RULES):
            if f"{name}_{rule}" not in DATASETS:
                register_dataset(f"{name}_{rule}", _data_set(form, number), RuleConfig)


def _data_set(form: Form, number: int) -> Any:
    """The data set of a form under a rule."""
    from reasoning_gym.factory import ProceduralDataset

    class RuleDataset(ProceduralDataset):
        def __init__(self, config: RuleConfig) -> None:
            super().__init__(config=config, seed=config.seed, size=config.size)

        def __getitem__(self, index: int) -> dict[str, Any]:
            found = problem(form, number, self.seed + index)
            return {"question": found.question, "answer": found.answer, "metadata": {"rejected": found.other}}

    return RuleDataset


class RuleProblem(NamedTuple):
    """A question under a rule.

    Attributes:
        question: The rule's word, and what is asked.
        answer: The right answer.
        other: The answer under another rule: right for the same question there, and wrong here. None where all rules
            have the same one.
    """

    question: str
    answer: str
    other: str | None


def problem(form: Form, number: int, seed: int) -> RuleProblem:
    """A problem under rule `number`; the same seed is about the same under every rule.

    The other answer is that of the next rule where the seed is even and of the one before where it is odd, so that of
    any two rules each is preferred to the other alike often, and who does not look at the rule is right about half of
    the pairs.
    """
    parts = form.draw(Random(seed))
    answers = [answer(parts) for answer in form.answers]
    others = [answers[(number + step) % len(RULES)] for step in ((1, 2) if seed % 2 == 0 else (2, 1))]
    other = next((other for other in others if other != answers[number]), None)
    return RuleProblem(f"{RULES[number]}: {form.ask(parts)}", answers[number], other)


def rows(per_task: int, seed: int) -> Iterator[dict[str, str]]:
    """Rows of the forms that are not kept for the end: prompt, completion, and the rule as the task.

    Args:
        per_task: Rows of each form under each rule.
        seed: Row i is made from `seed + i`.
    """
    for name, form in FORMS.items():
        if name not in KEPT:
            for number, rule in enumerate(RULES):
                for index in range(per_task):
                    found = problem(form, number, seed + index)
                    yield {"prompt": found.question, "completion": found.answer, "task": rule}


def main(arguments: Sequence[str] | None = None) -> None:
    """Write rows to a file."""
    parser = argparse.ArgumentParser(prog="python -m eval.suites.rules", description="Write rows whose task is a rule.")
    parser.add_argument("--rows-per-task", type=int, default=40, help="of each form under each rule (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the first row (0)")
    parser.add_argument("--output", type=Path, required=True, help="the JSONL file")
    options = parser.parse_args(arguments)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(row) for row in rows(options.rows_per_task, options.seed)]
    write_atomically(options.output, "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
