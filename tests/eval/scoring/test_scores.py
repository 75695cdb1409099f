from __future__ import annotations

import math

import pytest

from eval.scoring.scores import Score, difference, macro, mean


def test_a_mean_of_zeros_and_ones_has_the_binomial_error() -> None:
    score = mean([1.0] * 30 + [0.0] * 70)
    assert score.value == pytest.approx(0.3)
    assert score.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert score.n == 100


def test_one_value_has_no_spread() -> None:
    assert mean([0.5]) == Score(value=0.5, stderr=0.0, n=1)


def test_a_paired_difference_forgets_what_both_have() -> None:
    theirs = [0.0, 1.0] * 20
    gap = difference(theirs, theirs)
    assert (gap.value, gap.stderr) == (0.0, 0.0)
    ours = [1.0 - value for value in theirs]
    assert difference(ours, theirs).stderr > mean(ours).stderr
    with pytest.raises(ValueError, match="zip"):
        difference([1.0], [1.0, 0.0])


def test_the_mean_of_tasks_weighs_them_alike() -> None:
    score = macro([Score(0.2, 0.03, 10), Score(0.6, 0.04, 1000)])
    assert score.value == pytest.approx(0.4)
    assert score.stderr == pytest.approx(0.025)
    assert score.n == 1010
