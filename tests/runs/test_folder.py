from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from datasets import Dataset

from moelora.errors import RunError
from moelora.files import new_folder
from moelora.runs.config import BaselineConfig, DatasetConfig, RunConfig
from moelora.runs.folder import ADAPTER, BASELINE, RunDir, task_stage


def run_config(root: Path) -> RunConfig:
    return RunConfig(
        model="owner/model",
        output_dir=str(root),
        dataset=DatasetConfig(hub="owner/rows"),
        adapter={"preset": "mixlora", "r": 4},
        training={"max_steps": 3, "save_steps": 1},
    )


def checkpoint(run: RunDir, stage: str, step: int, state: str | None = "{}") -> Path:
    folder = run.checkpoints(stage) / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if state is not None:
        (folder / "trainer_state.json").write_text(state)
    return folder


def test_the_latest_whole_checkpoint_is_taken(tmp_path: Path) -> None:
    run = RunDir(tmp_path)
    assert run.last_checkpoint(ADAPTER) is None
    checkpoint(run, ADAPTER, 9)
    whole = checkpoint(run, ADAPTER, 10)
    checkpoint(run, ADAPTER, 11, state=None)
    checkpoint(run, ADAPTER, 12, state='{"global_step": ')
    assert run.last_checkpoint(ADAPTER) == whole
    assert run.last_checkpoint(BASELINE) is None


def test_a_changed_configuration_is_refused_with_what_changed(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), run_config(tmp_path)
    run.open(config)
    checkpoint(run, ADAPTER, 1)
    run.open(config)
    changed = dataclasses.replace(config, adapter={"preset": "mixlora", "r": 8}, training={"max_steps": 3, "seed": 7})
    with pytest.raises(
        RunError, match=r"another configuration: adapter.r: 4 -> 8; training.seed: None -> 7. Give another"
    ):
        run.open(changed)
    run.open(changed, restart=True)
    assert run.last_checkpoint(ADAPTER) is None
    run.open(changed)


@pytest.mark.parametrize("stage", [ADAPTER, BASELINE, task_stage(2, "b"), task_stage(1, "a", BASELINE)])
def test_a_stage_that_a_kill_left_half_written_is_gone_on_resuming(stage: str, tmp_path: Path) -> None:
    """Without `baseline`, too, where nobody writes that stage again; what is being written stays."""
    run, config = RunDir(tmp_path), run_config(tmp_path)
    run.open(dataclasses.replace(config, baseline=BaselineConfig()))
    place = run.stage(stage).parent
    half = place / f".{run.stage(stage).name}-0123abcd.part"
    half.mkdir(parents=True)
    (half / "adapter_model.safetensors").write_text("half")
    (place / ".notes.part").touch()
    with new_folder(place / "other") as other:
        run.open(config)
        assert {path.name for path in place.glob(".*")} == {".notes.part", other.name}
    assert not half.exists()


def test_before_anything_is_trained_every_change_is_welcome(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), run_config(tmp_path)
    run.open(config)
    run.open(dataclasses.replace(config, model="owner/other"))
    assert "owner/other" in run.config_file.read_text()


def test_what_changes_no_weight_may_change(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), run_config(tmp_path)
    run.open(config)
    checkpoint(run, ADAPTER, 1)
    config = dataclasses.replace(config, training={"max_steps": 3, "save_steps": 2}, baseline=BaselineConfig(r=2))
    config.evaluation.rows_per_task = 7
    run.open(config)
    checkpoint(run, BASELINE, 1)
    with pytest.raises(RunError, match=r"baseline.r: 2 -> 3"):
        run.open(dataclasses.replace(config, baseline=BaselineConfig(r=3)))


def test_changed_rows_are_refused(tmp_path: Path) -> None:
    run, config = RunDir(tmp_path), run_config(tmp_path)
    run.open(config)
    run.check_rows(Dataset.from_list([{"text": "a"}]))
    run.check_rows(Dataset.from_list([{"text": "b"}]))
    checkpoint(run, ADAPTER, 1)
    run.check_rows(Dataset.from_list([{"text": "b"}]))
    with pytest.raises(RunError, match="the training rows are not those"):
        run.check_rows(Dataset.from_list([{"text": "c"}]))


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunError, match="is a file"):
        RunDir(tmp_path / "file").open(run_config(tmp_path / "file"))
    foreign = tmp_path / "adapter"
    foreign.mkdir()
    (foreign / "adapter_config.json").write_text(json.dumps({}))
    with pytest.raises(RunError, match="has a trained adapter but no config.yaml"):
        RunDir(tmp_path).open(run_config(tmp_path))
