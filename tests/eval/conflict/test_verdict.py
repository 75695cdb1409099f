from __future__ import annotations

import random
import re

import numpy as np
import pytest

from eval.conflict.verdict import decide, errors_for_one_of, rows_needed, transfer_share
from eval.scoring.scores import Score, difference, macro


def tasks(*pairs: tuple[float, float], n: int = 50) -> dict[str, Score]:
    return {f"task {index}": Score(value, stderr, n) for index, (value, stderr) in enumerate(pairs)}


def test_headroom_and_its_error_are_those_of_the_differences() -> None:
    rng = random.Random(0)
    shared = [[rng.gauss(1.0, 1.0) for _ in range(n)] for n in (7, 40)]
    own = [[value - 0.1 + rng.gauss(0, 0.05) for value in values] for values in shared]
    found = [difference(*both) for both in zip(shared, own, strict=True)]
    for each, a, b in zip(found, map(np.array, shared), map(np.array, own), strict=True):
        assert each.value == pytest.approx(a.mean() - b.mean())
        assert each.stderr == pytest.approx((a - b).std(ddof=1) / len(a) ** 0.5)
        assert each.n == len(a)
    mean = macro(found)
    assert mean.value == pytest.approx((found[0].value + found[1].value) / 2)
    assert mean.stderr == pytest.approx(np.hypot(found[0].stderr, found[1].stderr) / 2)
    assert mean.n == 47


def test_transfer_share() -> None:
    base = {"a": 3.0, "b": 5.0}
    losses = {"a": {"a": 1.0, "b": 4.5}, "b": {"a": 2.7, "b": 3.0}}
    # own LoRAs bring 2 and 2, foreign ones 0.5 and 0.3
    assert transfer_share(base, losses) == pytest.approx(0.4 / 2)
    assert transfer_share(base, {"a": {"a": 3.5, "b": 1.0}, "b": {"a": 1.0, "b": 5.0}}) is None


def test_chance_lifts_one_of_many_tasks_no_more_often_than_a_mean() -> None:
    assert errors_for_one_of(1) == pytest.approx(2.0)
    rng = np.random.default_rng(0)
    for count in (4, 20):
        draws = rng.standard_normal((200_000, count)).max(1)
        assert (draws > errors_for_one_of(count)).mean() == pytest.approx(0.02275, rel=0.06)


@pytest.mark.parametrize(
    ("headroom", "transfer", "kind", "text"),
    [
        (tasks((-0.3, 0.02), (-0.1, 0.02)), 0.8, "lora", "A LoRA is enough: the tasks help each other."),
        (tasks((0.004, 0.004), (-0.004, 0.004)), 0.8, "lora", "A LoRA is enough: LoRAs by task gain less than 0.02"),
        (tasks((0.3, 0.02), (0.2, 0.02)), 0.1, "separate", "Keep separate LoRAs and compose: every task gains"),
        (tasks((0.3, 0.02), (0.2, 0.02)), 0.5, "mixture", "A mixture can help: every task .* help other tasks too"),
        (
            tasks((0.3, 0.02), (-0.3, 0.02)),
            0.1,
            "mixture",
            "A mixture can help: 1 of 2 .*, the others are not shown to.",
        ),
        (tasks(*[(0.06, 0.03)] * 4), 0.1, "mixture", "A mixture can help: .* no single one for sure"),
        (tasks((0.1, 0.2), (0.0, 0.2)), 0.1, "undecided", "Not decidable with n = 100: needs about"),
        (tasks((-0.1, 0.2), (0.0, 0.2)), 0.1, "undecided", "Not decidable with n = 100: needs about"),
    ],
)
def test_each_verdict(headroom: dict[str, Score], transfer: float | None, kind: str, text: str) -> None:
    verdict = decide(headroom, 1.0, transfer, 0.02)
    assert verdict.kind == kind
    assert re.match(text, verdict.text), verdict.text
    assert (verdict.more_rows is None) == (kind != "undecided")
    assert len(verdict.reasons) == 3


@pytest.mark.parametrize(
    ("headroom", "shared_gain", "transfer", "text"),
    [
        # what training has made worse than the base leaves headroom to LoRAs that have learned nothing
        (tasks((0.5, 0.02), (0.5, 0.02)), -0.5, None, "neither the shared LoRA nor own ones are better than"),
        (tasks((0.3, 0.02), (-0.3, 0.02)), -0.1, None, "neither the shared LoRA nor own ones are better than"),
        (tasks((0.1, 0.2), (0.0, 0.2)), 0.05, None, "own LoRAs are no better than"),
        # equally bad: there is no headroom, and one LoRA is not enough either
        (tasks((0.0, 0.004), (0.001, 0.004)), 0.0, None, "neither the shared LoRA nor own ones are better than"),
        (tasks((0.5, 0.02), (0.5, 0.02)), 0.0, 0.1, "the shared LoRA is no better than"),
    ],
)
def test_loras_that_have_learned_nothing_decide_nothing(
    headroom: dict[str, Score], shared_gain: float, transfer: float | None, text: str
) -> None:
    assert transfer_share({"a": 1.0, "b": 1.0}, {"a": {"a": 1.0, "b": 1.0}, "b": {"a": 1.0, "b": 1.0}}) is None
    verdict = decide(headroom, shared_gain, transfer, 0.02)
    assert verdict.kind == "undecided"
    assert verdict.text == f"Not decidable: {text} the base model."
    assert verdict.more_rows is None
    assert ("headroom by them is worth nothing" in verdict.reasons[-1]) == (transfer is None)


def test_a_shared_lora_that_has_learned_is_enough_where_own_ones_have_not() -> None:
    assert decide(tasks((-0.3, 0.02), (-0.1, 0.02)), 1.0, None, 0.02).kind == "lora"


def test_a_gain_that_is_seen_but_not_worth_having_is_none() -> None:
    assert decide(tasks((0.01, 0.001), (0.01, 0.001)), 1.0, 0.1, 0.02).kind == "lora"
    assert decide(tasks((0.01, 0.001), (0.01, 0.001)), 1.0, 0.1, 0.005).kind == "separate"


@pytest.mark.parametrize("value", [0.1, 0.03, -0.1, 0.0])
def test_with_the_rows_that_are_asked_for_it_is_decided(value: float) -> None:
    """If the mean stays and the error falls with the root of n."""
    headroom = tasks((value, 0.4), (value, 0.4))
    verdict = decide(headroom, 1.0, 0.1, 0.02)
    assert verdict.kind == "undecided"
    assert verdict.more_rows is not None
    n = 100 + verdict.more_rows
    stderr = 0.4 * (100 / n) ** 0.5
    assert decide(tasks((value, 0.999 * stderr), (value, 0.999 * stderr)), 1.0, 0.1, 0.02).kind != "undecided"
    fewer = stderr * (n / (0.9 * n)) ** 0.5
    assert decide(tasks((value, fewer), (value, fewer)), 1.0, 0.1, 0.02).kind == "undecided"


def test_at_the_margin_the_number_of_rows_stays_finite() -> None:
    assert rows_needed(Score(0.02, 0.1, 100), 0.02) == 40_000
