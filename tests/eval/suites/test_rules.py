"""Tasks that contradict each other."""

from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path
from random import Random
from typing import Any

import pytest

from eval.suites import rules
from eval.suites.rules import FORMS, RULES, problem, register
from moelora.runs.tasks import fresh_problems, task_data_set


@pytest.mark.parametrize("form", FORMS)
def test_the_same_question_has_three_answers(form: str) -> None:
    register()
    register()  # a second time changes nothing
    found = [fresh_problems(f"{form}_{rule}", {}, seed=7, size=60, seen=())[0] for rule in RULES]
    for rule, problems in zip(RULES, found, strict=True):
        assert len(problems) == 60
        assert all(problem.prompt.startswith(f"{rule}: ") for problem in problems)
    alike = list(zip(*found, strict=True))
    assert all(len({problem.prompt.split(": ")[1] for problem in three}) == 1 for three in alike)
    different = [three for three in alike if len({problem.answer for problem in three}) == 3]
    assert len(different) > 0.8 * len(alike)


def test_answers_by_hand() -> None:
    register()
    expected: dict[str, tuple[list[Any], str, tuple[str, ...]]] = {
        "numbers": ([31, 84, 57], "31 84 57", ("84", "31", "57")),
        "words": (["lamp", "tiger", "stone"], "lamp tiger stone", ("lamp", "tiger", "stone")),
        "letters": (list("caxb"), "c a x b", ("a b c x", "x c b a", "b x a c")),
        "sums": ([4, 19], "4 and 19", ("23", "15", "19")),
        "more": ([40, 38], "is 40 more than 38", ("yes", "no", "left")),
        "spelling": (["stone"], "stone", ("STONE", "Stone", "s")),
        "ends": (["stone"], "letter of stone", ("e", "s", "t")),
        "pairs": ([1, 2, 3, 4], "12 34", ("34 12", "21 43", "1 4")),
    }
    assert set(expected) == set(FORMS)
    for name, (parts, question, answers) in expected.items():
        assert FORMS[name].ask(parts) == question
        assert tuple(answer(parts) for answer in FORMS[name].answers) == answers


@pytest.mark.parametrize("name", FORMS)
def test_who_does_not_look_at_the_rule_is_right_about_half_of_the_pairs(name: str) -> None:
    """Whichever rule's answers are always preferred, and whichever come second."""
    form = FORMS[name]
    for ranking in permutations(range(3)):
        right = []
        for seed in range(400):
            parts = form.draw(Random(seed))
            ranks: dict[str, int] = {}
            for place, number in enumerate(ranking):
                ranks.setdefault(form.answers[number](parts), place)
            for number in range(3):
                other = problem(form, number, seed).other
                assert other is not None
                right.append(ranks[form.answers[number](parts)] < ranks[other])
        assert abs(sum(right) / len(right) - 0.5) < 0.04


def test_the_verifier_wants_the_whole_answer() -> None:
    register()
    data = task_data_set("numbers_red", {}, seed=3, size=2)
    entry = data[0]
    assert data.score_answer(entry["answer"], entry) == 1.0
    assert data.score_answer(f"It is {entry['answer']}", entry) < 1.0
    assert data.score_answer("", entry) == 0.0


def test_rows_whose_task_is_the_rule(tmp_path: Path) -> None:
    file = tmp_path / "new" / "rows.jsonl"
    rules.main(["--rows-per-task", "3", "--output", str(file)])
    found = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(found) == 3 * 3 * (len(FORMS) - len(rules.KEPT))
    assert all(row["prompt"].startswith(f"{row['task']}: ") for row in found)
    # of the same question each rule makes something else
    numbers = [row for row in found if row["prompt"].partition(": ")[2] == found[0]["prompt"].partition(": ")[2]]
    assert len({row["completion"] for row in numbers}) == 3
