from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest

from eval.conflict.advice import Place, next_steps
from eval.conflict.arms import Found
from eval.conflict.plan import Options, Plan
from eval.conflict.report import notes
from eval.conflict.verdict import Kind, Verdict
from moelora.runs.config import RunConfig, load_config
from tests.runs.tiny import write_run

OPTIONS = Options(rates=(0.5, 1.0, 4.0), held_out=0.4, margin=0.01)
GIVEN = ["--rates", "0.5", "1", "4", "--held-out", "0.4", "--margin", "0.01"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    return load_config(write_run(tmp_path_factory.mktemp("run"), adapter={"preset": "lora", "r": 4}))


def commands(config: RunConfig, kind: Kind, *, more: int | None = 5, dropout: float = 0.0) -> list[list[str]]:
    """The words of each command that follows a verdict."""
    plan = Plan(
        tasks=("a", "b"),
        rates={"0.5": 0.001, "1": 0.002, "4": 0.008},
        adapter_parameters=8,
        rank_parameters=1,
        rank=8,
        scaling=2.0,
        dropout=dropout,
        target_modules=["q_proj"],
        task_type="CAUSAL_LM",
        steps=4,
        part_steps=(2, 2),
        step_rows=1,
    )
    found = Found({"shared": "4", "own": "0.5", "random": "1"}, {}, {"a": [1.0] * 10}, {}, {}, {"a": 1.0, "b": 0.9})
    place = Place(("run.yaml", "training.learning_rate=0.002"), Path("out"))
    steps = next_steps(Verdict(kind, "", [], more), plan, found, config, place, OPTIONS)
    return [shlex.split(step["command"]) for step in steps]


@pytest.mark.parametrize("dataset", [{}, {"tasks": {}, "files": "rows.jsonl"}, {"tasks": {}, "limit": 50}])
def test_to_look_again_is_to_look_with_the_same_options(config: RunConfig, dataset: dict[str, Any]) -> None:
    before = {key: getattr(config.dataset, key) for key in dataset}
    try:
        vars(config.dataset).update(dataset)
        (again,) = commands(config, "undecided")
    finally:
        vars(config.dataset).update(before)
    assert again[:4] == ["moelora", "diagnose", "run.yaml", "training.learning_rate=0.002"]
    assert again[again.index("--out") :] == ["--out", "out-more", *GIVEN]


def test_where_rows_do_not_help_it_is_to_look_at_more_learning_rates(config: RunConfig) -> None:
    (again,) = commands(config, "undecided", more=None)
    wider = ["--rates", "0.25", "0.5", "1", "4", "8"]
    assert again[again.index("--out") :] == ["--out", "out-rates", *wider, *GIVEN[4:]]


def test_a_lora_is_trained_as_the_diagnosis_has_trained_it(config: RunConfig) -> None:
    (lora,) = commands(config, "lora", dropout=0.1)
    size = 'preset: lora, r: 8, lora_alpha: 16, lora_dropout: 0.1, target_modules: ["q_proj"]'
    rates = [word for word in lora if word.startswith("training.learning_rate=")]
    assert (f"adapter={{{size}}}" in lora, rates[-1]) == (True, "training.learning_rate=0.008")  # the last one counts
    _, in_turn = commands(config, "separate", dropout=0.1)
    size = size.replace("r: 8, lora_alpha: 16", "r: 4, lora_alpha: 8")
    rates = [word for word in in_turn if word.startswith("training.learning_rate=")]
    assert (f"adapter={{{size}}}" in in_turn, rates[-1]) == (True, "training.learning_rate=0.001")
    mixture = commands(config, "mixture", dropout=0.1)[0]
    assert any("preset: mixlora" in word and "lora_dropout: 0.1" in word for word in mixture)
    assert not any("lora_dropout" in word for word in commands(config, "lora")[0])


def test_centroids_are_composed_as_they_were_measured(config: RunConfig) -> None:
    compose = commands(config, "separate")[0]
    assert compose[compose.index("--router") + 1] == "{kind: centroids, unknown: false}"


def test_both_edges_of_the_grid_are_noted() -> None:
    def arm(factor: str, *factors: str) -> dict[str, Any]:
        losses = dict.fromkeys(factors, 1.0)
        return {"loras": 1, "rank": 1, "learning_rate": 1.0, "steps": 1, "factor": factor, "selection": losses}

    found = {
        "arms": {"shared": arm("0.5", "10", "0.5", "2"), "own": arm("10", "10", "0.5", "2"), "random": arm("2", "2")},
        "mean": {"partition": {"value": 0.0, "stderr": 0.1}, "shared": 1.0, "base": 2.0},
        "trainable_parameters": 1,
        "adapter_parameters": 1,
        "rows_dropped": 0,
    }
    edges = [note.partition(":")[0] for note in notes(found) if "learning rate was" in note]
    assert edges == [
        "The largest learning rate was the best for own",
        "The smallest learning rate was the best for shared",
    ]
