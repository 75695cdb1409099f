"""The errors of a comparison's table, against what they mean."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest

from eval.compare.cells import BASE
from eval.compare.summary import MethodSummary, Summary
from eval.scoring.scores import difference, mean

ROWS = [1.0] * 70 + [0.0] * 30
"""Whether "yes" is right."""


TASK = ["yes or no"]


def right(share: float) -> list[float]:
    """Rows of which a share is right, always the first ones."""
    return [1.0] * round(100 * share) + [0.0] * round(100 * (1 - share))


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
    # paired rows cancel, seeds do not, and a method has one where the base has none
    assert table.difference(single, base, ["yes or no"]).stderr == pytest.approx(math.sqrt(0.08))
    twin = method("twin", ROWS)
    assert table.difference(single, twin, ["yes or no"]).stderr == pytest.approx(math.sqrt(2 * 0.08))
    assert table.difference(base, flipping, ["yes or no"]).value == pytest.approx(0.2)


def test_without_a_second_seed_the_error_is_that_of_the_rows() -> None:
    single = method("single", ROWS)
    assert summary(single).score(single, ["yes or no"]).stderr == pytest.approx(mean(ROWS).stderr)


def test_a_method_that_scatters_more_than_the_others_has_a_larger_error() -> None:
    """Variances from seed to seed of 0.04 and 0.0001, pooled 0.02005: each method has the larger of the two."""
    wild = method("wild", right(0.3), right(0.5), right(0.7))
    calm = method("calm", right(0.49), right(0.5), right(0.51))
    table = summary(wild, calm)
    for each, variance in ((wild, 0.04), (calm, 0.02005)):
        rows = mean(each.rows("yes or no")).stderr
        assert table.score(each, TASK).stderr == pytest.approx(math.sqrt(rows**2 + variance / 3))


def test_differences_are_of_the_seeds_that_both_have() -> None:
    """The third seed of one method, where tasks come in an order that the other never had, does not count."""
    ours = method("ours", right(0.6), right(0.4))
    theirs = method("theirs", right(0.5), right(0.3), right(0.9))
    table = summary(ours, theirs)
    found = table.difference(ours, theirs, TASK)
    assert found.value == pytest.approx(0.1)
    rows = difference(ours.rows("yes or no"), theirs.rows("yes or no", [0, 1])).stderr
    pooled = (0.02 + 2 * (0.28 / 3)) / 3  # variances 0.02 with one degree of freedom, 0.28 / 3 with two
    assert found.stderr == pytest.approx(math.sqrt(rows**2 + 2 * pooled / 2))


def test_methods_that_share_no_seed_are_not_compared() -> None:
    ours, theirs = method("ours", right(0.6)), method("theirs", right(0.5))
    table = summary(ours, theirs)
    ours.against = "theirs"
    assert table.compared_with(ours) is theirs
    theirs.seeds = {7: theirs.seeds[0]}
    assert table.compared_with(ours) is None
