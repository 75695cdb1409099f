from __future__ import annotations

from pathlib import Path

import pytest

from eval.scoring.own_tasks import TaskResult, make_problems, verify
from moelora.errors import RunError
from moelora.runs.config import RunConfig, load_config
from moelora.runs.data import load_rows
from moelora.runs.tasks import problems
from tests.runs.tiny import tiny_tokenizer, write_run


def run_config(folder: Path, *overrides: str) -> RunConfig:
    return load_config(write_run(folder), overrides)


def result(task: str, config: RunConfig) -> TaskResult:
    assert config.dataset.tasks is not None
    found = list(problems(task, config.dataset.tasks[task], seed=9, size=4))
    return TaskResult(task, found, dropped=0, majority=0.5, prompts=[])


def test_the_verifier_of_the_task_decides(tmp_path: Path) -> None:
    config = run_config(tmp_path, "dataset.tasks.spell_backward={}", "dataset.tasks.family_relationships={}")
    for task in ("spell_backward", "family_relationships", "gcd"):
        each = result(task, config)
        assert verify(each, config, [problem.answer for problem in each.problems]) == [1.0] * 4
        assert max(verify(each, config, ["?"] * 4)) < 1
    words = result("spell_backward", config)
    first, second, *rest = (problem.answer for problem in words.problems)
    words.scores["m"] = verify(words, config, [first.upper(), second[:-1] + "?", *rest])
    # reasoning-gym gives part of the points for part of the letters, and does not mind capitals
    assert words.scores["m"][0] == 1.0
    assert 0 < words.scores["m"][1] < 1
    assert words.exact("m") == [1.0, 0.0, 1.0, 1.0]


def test_no_problem_occurs_in_training(tmp_path: Path) -> None:
    # reasoning-gym makes problem i from seed + i, so a near seed repeats the training rows
    config = run_config(tmp_path, "evaluation.seed=6", "evaluation.rows_per_task=8", "dataset.tasks={gcd: {}}")
    rows = load_rows(config.dataset, tiny_tokenizer())
    trained = {row["prompt"][-1]["content"] for row in rows}
    (found,) = make_problems(config, tiny_tokenizer())
    assert found.dropped == 6
    assert len(found.problems) == 8
    assert not trained & {problem.prompt for problem in found.problems}


def test_prompts_are_those_of_training(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    found = make_problems(config, tiny_tokenizer(), limit=2)[0]
    text = tiny_tokenizer().decode(found.prompts[0])
    assert text == f"<|system|>Reply.<|end|><|user|>{found.problems[0].prompt}<|end|><|assistant|>"


def test_a_task_that_was_learned_by_heart_cannot_be_scored(tmp_path: Path) -> None:
    config = run_config(tmp_path, "dataset.tasks={gcd: {max_value: 2}}", "dataset.rows_per_task=200")
    with pytest.raises(RunError, match=r"task 'gcd' has no problem that is not among the training rows"):
        make_problems(config, tiny_tokenizer())


def test_other_data_has_no_verifier(tmp_path: Path) -> None:
    config = run_config(tmp_path)
    config.dataset.tasks, config.dataset.files = None, "rows.jsonl"
    with pytest.raises(RunError, match="has no problems of its own; say what to score it on"):
        make_problems(config, tiny_tokenizer())
