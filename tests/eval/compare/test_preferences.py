"""Comparisons that are trained on pairs of answers and scored by which of the two is more likely, on a tiny model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.compare.__main__ import main
from eval.compare.cells import Board, Cell
from eval.compare.measures import Preferences
from eval.compare.schema import load_benchmark
from eval.compare.sizes import check_sizes, source_of
from eval.compare.skill_bench import SkillBench
from eval.suites.rules import RULES
from moelora import MoeLoraDPOTrainer
from moelora.errors import MoeLoraError
from moelora.runs.folder import ADAPTER, RunDir
from moelora.runs.models import load_adapter, load_model
from tests.eval.compare.test_skills import CHANGES, LORA, PART, SEED, board_of, folder_of, read, write

TASKS: dict[str, Any] = {f"sums_{rule}": {} for rule in ("red", "green", "blue")}
METHODS: dict[str, Any] = {
    "joint": {"title": "joint", "adapter": {**LORA, "r": 6, "lora_alpha": 12}, "seeds": [SEED]},
    "loras": {"title": "apart", "adapter": PART, "regime": {"kind": "apart"}, "seeds": [SEED]},
    "centroids": {
        "title": "centroids",
        "regime": {"kind": "composed", "of": "loras", "router": {"kind": "centroids", "unknown": False}},
        "seeds": [SEED],
    },
}


def write_preferences(folder: Path, **changes: Any) -> Path:
    data = {**CHANGES["data"], "tasks": TASKS, "foreign": {}}
    selection = {"learning_rates": [0.01, 0.001]}
    return write(folder, **{"recipe": "dpo", "data": data, "methods": METHODS, "selection": selection, **changes})


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a comparison that ran to its end."""
    folder = tmp_path_factory.mktemp("preferences")
    assert main([str(write_preferences(folder))]) == 0
    return folder


def bench_of(folder: Path) -> SkillBench:
    config = load_benchmark(folder / "benchmark.yaml")
    return SkillBench.open(Board(config), check_sizes(config), "")


def answers_to(question: str) -> tuple[str, set[str]]:
    """The right answer to a question about two numbers, and those of the two other rules."""
    rule, words = question.split(": ")
    a, b = map(int, words.split(" and "))
    answers = dict(zip(RULES, (str(a + b), str(abs(a - b)), str(max(a, b))), strict=True))
    right = answers.pop(rule)
    return right, set(answers.values()) - {right}


def log_likelihood(model: Any, tokenizer: Any, question: str, answer: str) -> float:
    """The naive sum over an answer's tokens, with the end of the turn, one forward for each answer."""
    messages = [{"role": "system", "content": "Reply."}, {"role": "user", "content": question}]
    words: dict[str, Any] = {"tokenize": True, "return_dict": False}
    before = tokenizer.apply_chat_template(messages, add_generation_prompt=True, **words)
    whole = tokenizer.apply_chat_template([*messages, {"role": "assistant", "content": answer}], **words)
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([whole])).logits[0].float().log_softmax(-1)
    assert whole[: len(before)] == before
    return sum(float(log_p[i - 1, whole[i]]) for i in range(len(before), len(whole)))


def test_a_problem_is_right_where_the_right_answer_is_more_likely(finished: Path) -> None:
    bench = bench_of(finished)
    adapter = RunDir(folder_of(finished, "joint")).stage(ADAPTER)
    model = load_adapter(load_model(source_of(bench.config)), str(adapter)).eval()
    scores = read(finished, "joint")
    for task in bench.problems:
        assert isinstance(bench.measure, Preferences)
        margins = bench.measure.margins(model, task)
        for index, margin in enumerate(margins):
            question = task.problems[index].prompt
            right, others = answers_to(question)
            wrong = task.problems[index].entry["metadata"]["rejected"]
            assert wrong in others
            naive = log_likelihood(model, bench.tokenizer, question, right) - log_likelihood(
                model, bench.tokenizer, question, wrong
            )
            assert margin == pytest.approx(naive, abs=1e-3)
        assert scores.tasks[task.task].values == [float(margin > 0) for margin in margins]
        share, loss = bench.measure.trial(model, task)
        assert share == sum(margin > 0 for margin in margins) / len(margins)
        assert loss == pytest.approx(sum(math.log(1 + math.exp(-margin)) for margin in margins) / len(margins))


def test_it_is_trained_by_dpo_on_the_answers_of_two_rules(finished: Path) -> None:
    bench = bench_of(finished)
    assert bench.measure.trainer_class() is MoeLoraDPOTrainer
    for rows in bench.rows.values():
        assert len(rows) == 8
        for row in rows:
            right, others = answers_to(row["prompt"][-1]["content"])
            assert row["chosen"][0]["content"] == right
            assert row["rejected"][0]["content"] in others
    arguments = bench.arguments(Cell("final", "joint", SEED, 0.01), finished / "x")
    assert type(arguments).__name__ == "DPOConfig"


def test_the_page_says_how_it_is_scored(finished: Path) -> None:
    text = (finished / "results" / "README.md").read_text()
    assert "sums_red preferred" in text
    assert "against the model as it was when the training began" in text
    assert "whose right answer is more likely than the wrong one (a coin has 50)" in text
    assert "Preferred right answers in percent of 3 problems" in text
    assert "exact" not in text.lower()
    assert "majority" not in text
    assert read(finished, "centroids").extra["chosen"]["own"].keys() == TASKS.keys()


def test_training_moves_the_model_to_the_right_answers(finished: Path) -> None:
    """The loss of the pairs, of which the trial of the higher rate has less than the base's."""
    bench = bench_of(finished)
    base = load_model(source_of(bench.config)).eval()
    before = sum(bench.measure.trial(base, task)[1] for task in bench.selection) / len(TASKS)
    trial = board_of(finished).read_json(Cell("select", "joint", 1000, 0.01))
    assert trial["loss"] < before


def test_two_models_are_asked_alike_only_with_the_same_wrong_answers(finished: Path) -> None:
    bench = bench_of(finished)
    task = bench.problems[0]
    before = bench.measure.asked(task)
    task.problems[0].entry["wrong_answer"] = "other"
    assert bench.measure.asked(task) != before


def test_routers_that_learn_from_answers_get_the_right_ones(tmp_path: Path) -> None:
    gates = {"title": "gates", "regime": {"kind": "composed", "of": "loras", "router": "phatgoose"}, "seeds": [SEED]}
    methods = {"joint": METHODS["joint"], "loras": METHODS["loras"], "gates": gates}
    selection = {"learning_rates": [0.01]}
    assert main([str(write_preferences(tmp_path, methods=methods, selection=selection))]) == 0
    assert read(tmp_path, "gates").extra["training"]["rows"] == 24


def test_a_task_without_a_wrong_answer_is_refused_before_anything_is_trained(tmp_path: Path) -> None:
    data = {**CHANGES["data"], "foreign": {}, "selection_rows": 1}
    file = write_preferences(tmp_path, data=data, methods={"joint": METHODS["joint"]})
    with pytest.raises(MoeLoraError, match=r"same right answer.*or raise data.selection_rows"):
        bench_of(file.parent)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("recipe=kto", "recipe is 'kto'"),
        ("evaluation.earlier_turns=1", "earlier_turns is 1 with recipe 'dpo'; allowed: 0"),
        ("methods.joint.regime={kind: orthogonal}", "regime 'orthogonal', which trains on answers, with recipe 'dpo'"),
        ("data={tasks: [boolq]}", "recipe is 'dpo' with the suite commonsense; allowed: 'sft'"),
    ],
)
def test_what_cannot_be_meant_is_refused(finished: Path, override: str, message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        load_benchmark(finished / "benchmark.yaml", [override])
