"""The errors of a comparison's table, against what they mean."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from eval.compare.cells import BASE
from eval.compare.summary import MethodSummary, Summary
from eval.scoring.scores import mean

ROWS = [1.0] * 70 + [0.0] * 30
"""Whether "yes" is right."""


def method(key: str, *seeds: list[float]) -> MethodSummary:
    def scores(values: list[float]) -> Any:
        return SimpleNamespace(tasks={"yes or no": SimpleNamespace(values=values, score=mean(values), majority=0.7)})

    return MethodSummary(key, key, list(range(len(seeds))), {i: scores(values) for i, values in enumerate(seeds)})


def summary(*methods: MethodSummary) -> Summary:
    return Summary(list(methods), ["yes or no"], ["yes or no"], None, {}, 0.0, 1, 1, [])


def test_seeds_that_answer_the_opposite_are_not_an_exact_score() -> None:
    """Always yes and always no: the mean of each row is one half, so the rows alone would give an error of zero."""
    flipping = method("flipping", ROWS, [1 - value for value in ROWS])
    found = summary(flipping).score(flipping, ["yes or no"])
    assert found.value == pytest.approx(0.5)
    assert found.stderr == pytest.approx(math.sqrt(0.4**2 / 2 / 2))  # the variance of 0.7 and 0.3, of two seeds


def test_seeds_count_for_methods_with_one_of_them_but_not_for_the_base() -> None:
    flipping = method("flipping", ROWS, [1 - value for value in ROWS])
    single, base = method("single", ROWS), method(BASE, ROWS)
    table = summary(base, flipping, single)
    of_rows = mean(ROWS).stderr
    assert table.score(base, ["yes or no"]).stderr == pytest.approx(of_rows)
    assert table.score(single, ["yes or no"]).stderr == pytest.approx(math.sqrt(of_rows**2 + 0.08))
    # paired rows cancel, seeds do not
    assert table.difference(single, base, ["yes or no"]).stderr == pytest.approx(math.sqrt(0.08))


def test_without_a_second_seed_the_error_is_that_of_the_rows() -> None:
    single = method("single", ROWS)
    assert summary(single).score(single, ["yes or no"]).stderr == pytest.approx(mean(ROWS).stderr)
