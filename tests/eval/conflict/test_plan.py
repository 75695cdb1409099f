from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from peft import get_peft_model

from eval.conflict.advice import expert_names
from eval.conflict.plan import OWN, RANDOM, SHARED, Options, make_plan, warmup
from eval.conflict.run import _open as open_folder
from eval.conflict.split import split_rows
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.config import load_config
from moelora.runs.folder import RunDir
from moelora.runs.models import load_model
from moelora_cli.diagnose import add_arguments
from tests.runs.tiny import write_run


def plan_of(folder: Path, *overrides: str, counts: tuple[int, ...] = (60, 30, 30), **changes: Any) -> Any:
    config = load_config(write_run(folder, **changes), overrides)
    rows = [
        {"prompt": f"{t} {n}", "completion": "x", "task": f"t{t}"}
        for t, count in enumerate(counts)
        for n in range(count)
    ]
    return config, make_plan(config, split_rows(Dataset.from_list(rows), 0.3, seed=0), Options())


def test_all_arms_have_the_same_size_and_steps(tmp_path: Path) -> None:
    adapter = {"preset": "mixlora", "r": 8, "lora_alpha": 16, "num_experts": 4, "top_k": 2}
    training = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "num_train_epochs": 3}
    config, plan = plan_of(tmp_path, adapter=adapter, training={**training, "learning_rate": 1e-3})
    # 42 + 21 + 21 rows to train, eight a step, three times
    assert plan.steps == 3 * 11
    assert sum(plan.part_steps) == plan.steps
    assert plan.part_steps == (16, 9, 8)
    assert plan.rank % 3 == 0
    assert abs(plan.rank - plan.adapter_parameters / plan.rank_parameters) <= 1.5
    assert plan.rates == {"1": 1e-3, "2": 2e-3}
    sizes = {}
    for arm in (SHARED, OWN, RANDOM):
        lora = plan.lora(arm)
        assert lora.lora_alpha / lora.r == 2.0
        one = get_peft_model(load_model(config), lora).get_nb_trainable_parameters()[0]
        sizes[arm] = one * len(plan.stages(arm, "1"))
        assert len(plan.steps_of(arm)) == len(plan.stages(arm, "1"))
    assert set(sizes.values()) == {plan.rank * plan.rank_parameters}


def test_a_small_adapter_is_rounded_up_to_one_rank_a_task(tmp_path: Path) -> None:
    adapter = {"preset": "lora", "r": 1, "target_modules": "all-linear"}
    _, plan = plan_of(tmp_path, "training.max_steps=2", adapter=adapter)
    assert (plan.rank, plan.part_rank) == (3, 1)
    assert plan.adapter_parameters == plan.rank_parameters
    assert plan.steps == 3
    assert plan.part_steps == (1, 1, 1)


def test_the_warm_up_of_a_part_is_shorter_as_its_training_is(tmp_path: Path) -> None:
    class Arguments:
        warmup_steps: float = 10

    assert warmup(Arguments, 33, 100) == 3
    assert warmup(Arguments, 100, 100) == 10
    Arguments.warmup_steps = 0.1
    assert warmup(Arguments, 33, 100) == 0.1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"rates": ()}, "--rates are"),
        ({"rates": (1.0, 1.0)}, "--rates are"),
        ({"rates": (0.0,)}, "--rates are"),
        ({"held_out": 1.0}, "--held-out is 1.0; allowed: a share"),
        ({"margin": 0.0}, "--margin is 0.0; allowed: a positive"),
    ],
)
def test_options_out_of_range_are_refused(words: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        Options(**words)


def test_options_that_are_not_at_their_defaults_are_words() -> None:
    assert Options().words() == []
    given = Options(rates=(0.5, 1.0), held_out=0.25, margin=0.01)
    assert given.words() == ["--rates", "0.5", "1", "--held-out", "0.25", "--margin", "0.01"]
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    read = parser.parse_args(["run.yaml", *given.words()])
    assert Options(rates=tuple(read.rates), held_out=read.held_out, margin=read.margin) == given
    read = parser.parse_args(["run.yaml"])
    assert Options(rates=tuple(read.rates), held_out=read.held_out, margin=read.margin) == Options()


def test_a_restart_throws_away_what_was_made_and_nothing_else(tmp_path: Path) -> None:
    config, plan = plan_of(tmp_path)
    folder = RunDir(tmp_path / "out")
    words = (folder, config, plan, Options(), {"rows": 1, "sha256": "0"})
    open_folder(*words, restart=False)
    for name in ("diagnosis.json", "scores/base.json", "stages/own-1x-1/adapter_config.json", "mine.txt"):
        write_atomically(folder.root / name, "{}")
    open_folder(*words, restart=False)
    other = (folder, config, plan, Options(held_out=0.5), {"rows": 2, "sha256": "1"})
    with pytest.raises(RunError, match=r"held_out: 0.3 -> 0.5; rows.rows: 1 -> 2; .*--restart to throw"):
        open_folder(*other, restart=False)
    assert (folder.root / "diagnosis.json").is_file()
    open_folder(*other, restart=True)
    assert {path.name for path in folder.root.iterdir()} == {"mine.txt", "plan.json", "config.yaml"}


def test_names_of_experts_differ_and_need_no_quotes() -> None:
    assert expert_names(["a b", "a_b", "<b>", "..", "x"]) == {
        "a b": "a_b",
        "a_b": "a_b_2",
        "<b>": "b",
        "..": "task",
        "x": "x",
    }
