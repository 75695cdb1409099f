"""Tasks that contradict each other: questions of one form, for whose answers there are three rules.

The first word of a prompt says the rule ("red", "green", "blue"); the rest looks alike under all three. What is learnt
for one rule is wrong for the others, so that a low-rank update that all share has to tell them apart, and one for each
rule has not. `register` makes them ordinary tasks of reasoning-gym, named as "numbers_red".
"""

from __future__ import annotations

import functools
import importlib.util
import string
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

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
    # kept for the end: nothing was chosen by looking at these two
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
            # the same parts under every rule
            parts = form.draw(Random(self.seed + index))
            question = f"{RULES[number]}: {form.ask(parts)}"
            return {"question": question, "answer": form.answers[number](parts), "metadata": {}}

    return RuleDataset
