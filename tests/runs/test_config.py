from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora.errors import ConfigError, MoeLoraError
from moelora.runs.config import adapter_config, load_config, save_config, training_config
from moelora.runs.yaml_file import apply_override, parse_yaml
from tests.runs.tiny import WORDS


def write(folder: Path, **changes: Any) -> Path:
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({**WORDS, "model": "owner/model", "output_dir": str(folder / "run"), **changes}))
    return file


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"modell": "x"},
            r"unknown key 'modell' in the configuration. Did you mean 'model'\? Allowed: adapter, .*training",
        ),
        (
            {"dataset": {"hub": "a/b", "rows": 1}},
            r"unknown key 'rows' in dataset.* Allowed: chat, columns, files, held_out",
        ),
        (
            {"training": {"learning_ratee": 1}},
            r"unknown key 'learning_ratee' in training. Did you mean 'learning_rate'",
        ),
        ({"baseline": {"rank": 4}}, r"unknown key 'rank' in baseline"),
        (
            {"evaluation": {"rows_per_tas": 4}},
            r"unknown key 'rows_per_tas' in evaluation. Did you mean 'rows_per_task'",
        ),
        ({"adapter": {"r": 4}}, r"adapter.preset is None; it must be one of .*mixlora, "),
        ({"dtype": "bf16"}, r"dtype is 'bf16'; allowed: 'fastest' or 'bfloat16' or 'float16' or 'float32'"),
        ({"dataset": {"hub": "a/b", "limit": "many"}}, r"dataset.limit is 'many'; allowed: a whole number or null"),
        (
            {"dataset": {"hub": "a/b", "files": "x.csv"}},
            r"dataset says hub and files of tasks, hub and files; exactly one",
        ),
        ({"dataset": {}}, r"dataset says none of tasks, hub and files"),
        ({"dataset": {"tasks": {"gcd": None}}}, r"dataset.tasks.gcd is None; it must be a mapping"),
        ({"dataset": {"hub": "a/b", "limit": 0}}, r"dataset.limit is 0; allowed: at least 1"),
        ({"baseline": {"r": "most"}}, r"baseline.r is 'most'; allowed: a whole number or 'match'"),
        ({"training": {"output_dir": "x"}}, r"training.output_dir cannot be set: it is the run's output_dir"),
        ({"training": {"learning_rate": "fast"}}, r"training: .*invalid float value: 'fast'"),
        ({"training": {"lr_scheduler_type": "cosin"}}, r"training: cosin is not a valid SchedulerType"),
    ],
)
def test_what_is_not_allowed_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        load_config(write(tmp_path, **changes))


def test_unknown_words_of_a_preset_are_refused_with_its_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"num_expert\b.*num_experts"):
        load_config(write(tmp_path, adapter={"preset": "mixlora", "num_expert": 4}))
    with pytest.raises(ConfigError, match=r"unknown preset 'mixlorra'; allowed: .*Did you mean 'mixlora'"):
        load_config(write(tmp_path, adapter={"preset": "mixlorra"}))


def test_missing_keys_are_named(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("model: a/b\n")
    with pytest.raises(MoeLoraError, match="lacks 'output_dir', 'dataset', 'adapter'"):
        load_config(file)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "is not valid YAML"),
        ("model: a\nmodel: b", "key 'model' is given twice"),
        ("- 1", "must hold a mapping"),
        (None, "cannot read"),
    ],
)
def test_unreadable_files(tmp_path: Path, text: str | None, message: str) -> None:
    file = tmp_path / "run.yaml"
    if text is not None:
        file.write_text(text)
    with pytest.raises(MoeLoraError, match=message):
        load_config(file)


def test_overrides_reach_every_level(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path),
        [
            "adapter.r=5",
            "training.learning_rate=2e-4",
            "dataset.tasks.gcd.max_value=9",
            "baseline.r=3",
            "output_dir=elsewhere",
            "evaluation={rows_per_task: 2}",
        ],
    )
    assert adapter_config(config).experts.r == 5
    assert config.training["learning_rate"] == 2e-4
    assert config.dataset.tasks is not None
    assert config.dataset.tasks["gcd"] == {"max_value": 9}
    assert config.baseline is not None
    assert config.baseline.r == 3
    assert config.output_dir == "elsewhere"
    assert (config.evaluation.rows_per_task, config.evaluation.batch_size) == (2, 50)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("adapter.r", "is not key=value"),
        ("=3", "is not key=value"),
        ("a=[1", "is not valid YAML"),
        ("model.name=x", "model is 'm', which has no keys"),
    ],
)
def test_bad_overrides(override: str, message: str) -> None:
    with pytest.raises(MoeLoraError, match=message):
        apply_override({"model": "m"}, override)


def test_an_override_with_an_unknown_key_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MoeLoraError, match=r"unknown key 'max_step' in training. Did you mean 'max_steps'"):
        load_config(write(tmp_path), ["training.max_step=3"])


@pytest.mark.parametrize(
    ("text", "value"), [("1e-3", 1e-3), ("2E4", 2e4), ("1.5e-3", 1.5e-3), ("-.5e+1", -5.0), ("3", 3)]
)
def test_numbers_are_numbers(text: str, value: float) -> None:
    parsed = parse_yaml(f"a: {text}")["a"]
    assert parsed == value
    assert type(parsed) is type(value)


@pytest.mark.parametrize(("text", "value"), [("true", True), ("False", False), ("null", None), ("~", None)])
def test_the_other_scalars(text: str, value: bool | None) -> None:
    assert parse_yaml(f"a: {text}")["a"] is value


@pytest.mark.parametrize("text", ["e3", "1e", "1e-3x", "v1.5", "no", "on", "off", "yes"])
def test_texts_stay_texts(text: str) -> None:
    assert parse_yaml(f"a: {text}")["a"] == text


def test_a_saved_configuration_is_the_same_run(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, baseline={"r": 2}))
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config


def test_training_takes_the_fields_of_sft_config(tmp_path: Path) -> None:
    training = {
        "learning_rate": "3e-4",
        "max_steps": 7,
        "gradient_checkpointing": True,
        "lr_scheduler_kwargs": {"a": 1},
    }
    config = load_config(write(tmp_path, training=training))
    args = training_config(config, tmp_path, {"seed": 11})
    assert (args.learning_rate, args.max_steps, args.seed) == (3e-4, 7, 11)
    assert args.gradient_checkpointing is True
    assert args.lr_scheduler_kwargs == {"a": 1}
    assert args.output_dir == str(tmp_path)
    assert args.report_to == []
    assert training_config(load_config(write(tmp_path)), tmp_path).gradient_checkpointing is False
