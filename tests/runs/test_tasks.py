from __future__ import annotations

import pytest

from moelora.errors import MoeLoraError
from moelora.runs.tasks import fresh_problems, problems, task_data_set


def test_the_same_seed_gives_the_same_problems() -> None:
    first, again, other = (
        [problem.prompt for problem in problems("gcd", {}, seed=seed, size=5)] for seed in (1, 1, 1_000)
    )
    assert first == again
    assert not set(first) & set(other)


def test_near_seeds_share_problems_which_is_why_overlap_is_checked() -> None:
    near = {problem.prompt for problem in problems("gcd", {}, seed=2, size=5)}
    assert near & {problem.prompt for problem in problems("gcd", {}, seed=1, size=5)}


def test_fresh_problems_are_distinct_and_not_seen() -> None:
    options = {"max_value": 6}
    seen = {problem.prompt for problem in problems("gcd", options, seed=0, size=12)}
    fresh, dropped = fresh_problems("gcd", options, seed=5, size=10, seen=seen)
    prompts = [problem.prompt for problem in fresh]
    assert len(prompts) == len(set(prompts)) == 10
    assert not seen & set(prompts)
    assert dropped > 0


def test_a_task_with_few_problems_gives_what_it_has() -> None:
    everything = {problem.prompt for problem in problems("gcd", {"max_value": 2}, seed=0, size=200)}
    fresh, dropped = fresh_problems("gcd", {"max_value": 2}, seed=5, size=10, seen=everything)
    assert fresh == []
    assert dropped == 100


@pytest.mark.parametrize(
    ("task", "options", "message"),
    [
        ("gdc", {}, r"unknown key 'gdc' in dataset.tasks. Did you mean 'gcd'"),
        ("gcd", {"max_values": 3}, r"unknown key 'max_values' in dataset.tasks.gcd. Did you mean 'max_value'"),
        ("gcd", {"seed": 3}, r"unknown key 'seed' in dataset.tasks.gcd"),
        ("gcd", {"max_value": 0}, r"reasoning-gym refuses the options \{'max_value': 0\}"),
    ],
)
def test_what_reasoning_gym_does_not_take(task: str, options: dict[str, int], message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        task_data_set(task, options, seed=0, size=1)
