from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests.runs.tiny import write_run
from tests.training.processes import run_two
from train import sft
from train.__main__ import main


class StopAfter(TrainerCallback):
    """Ctrl-C once a step is done and its checkpoint written."""

    step = 3

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyboardInterrupt


def weights(folder: Path) -> dict[str, Any]:
    return load_file(folder / "run" / "adapter" / "adapter_model.safetensors")


def test_a_stopped_run_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, stopped = (str(write_run(tmp_path / name)) for name in made(tmp_path, "whole", "stopped"))
    assert main([whole]) == 0

    with monkeypatch.context() as patch:
        start = sft.RunTrainer.train

        def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
            self.add_callback(StopAfter())
            return start(self, *args, **kwargs)

        patch.setattr(sft.RunTrainer, "train", interrupted)
        assert main([stopped]) == 130
    assert "Run the same command again" in capsys.readouterr().err
    assert not (tmp_path / "stopped/run/adapter").exists()

    assert main([stopped]) == 0
    assert "from " + str(tmp_path / "stopped/run/checkpoints/adapter/checkpoint-2") in capsys.readouterr().out
    record = json.loads((tmp_path / "stopped/run/adapter/training.json").read_text())
    assert (record["resumed_from"], record["steps"]) == ("checkpoint-2", 4)
    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "stopped")
    assert expected.keys() == found.keys()
    for name, value in expected.items():
        assert value.equal(found[name]), name

    assert main([stopped]) == 0
    assert "The adapter is trained already" in capsys.readouterr().out
    assert main([stopped, "adapter.r=3"]) == 1
    assert "another configuration: adapter.r: 2 -> 3" in capsys.readouterr().err


def made(folder: Path, *names: str) -> tuple[str, ...]:
    for name in names:
        (folder / name).mkdir()
    return names


def test_losses_are_shown_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path)), "training.max_steps=2"]) == 0
    shown = capsys.readouterr().out
    assert "Rows      24: gcd 12, letter_counting 12" in shown
    for step in (1, 2):
        line = next(line for line in shown.splitlines() if f"step {step}/2" in line)
        assert all(word in line for word in ("loss ", "balance ", "busiest expert ", "dead experts "))
    record = json.loads((tmp_path / "run/adapter/training.json").read_text())
    assert [entry["step"] for entry in record["log"]] == [1, 2]
    assert all(entry["balance_loss"] >= 1 for entry in record["log"])


def test_what_is_wrong_is_said_without_a_traceback(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(write_run(tmp_path))
    assert main([file, "adapter.preset=mixture"]) == 1
    assert main([file, "training.max_step=3"]) == 1
    errors = capsys.readouterr().err.splitlines()
    assert errors[0].startswith("error: unknown preset 'mixture'")
    assert errors[1].startswith("error: unknown key 'max_step' in training. Did you mean 'max_steps'?")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("dtype", "adapter_dtype", "stored"),
    [
        ("float32", "bfloat16", torch.bfloat16),
        ("bfloat16", "bfloat16", torch.bfloat16),
        ("bfloat16", "float32", torch.float32),
        ("bfloat16", "auto", torch.float32),
    ],
)
def test_the_adapter_has_the_data_type_that_is_asked_for(
    tmp_path: Path, dtype: str, adapter_dtype: str, stored: torch.dtype
) -> None:
    words = ["training.max_steps=1", f"dtype={dtype}", f"adapter_dtype={adapter_dtype}", "baseline={r: 2}"]
    assert main([str(write_run(tmp_path)), *words]) == 0
    for stage in ("adapter", "baseline"):
        saved = load_file(tmp_path / "run" / stage / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in saved.values()} == {stored}, stage


@pytest.mark.distributed
def test_two_processes_train_as_one_and_one_of_them_speaks(tmp_path: Path) -> None:
    adapter = {"preset": "mixlora", "r": 2, "num_experts": 3, "lora_dropout": 0.0}
    file = str(write_run(tmp_path, adapter=adapter))
    assert main([file, f"output_dir={tmp_path / 'one'}"]) == 0
    changes = ["training.per_device_train_batch_size=1", f"output_dir={tmp_path / 'two'}"]
    first, second = run_two("train", file, *changes, output=tmp_path / "two")
    assert first.count("Training  adapter") == 1
    # torch 2.10 itself says that its processes have met
    assert [line for line in second.splitlines() if not line.startswith("[Gloo]")] == []
    logs = [json.loads((tmp_path / name / "adapter/training.json").read_text())["log"] for name in ("one", "two")]
    for key in ("loss", "balance_loss", "expert_load/busiest"):
        one, two = ([entry[key] for entry in log] for log in logs)
        assert one == pytest.approx(two, rel=1e-4), key
