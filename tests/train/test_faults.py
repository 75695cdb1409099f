"""What goes wrong with a run: one line, the right exit status, and nothing lost or half-written."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from moelora.runs.program import exit_status
from tests.runs.tiny import write_run
from train import sft
from train.__main__ import main

WEIGHTS = "run/adapter/adapter_model.safetensors"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("run"))


NUMBERS = {
    "training.max_steps=0": "training.max_steps is 0; allowed: at least 1; -1 trains for num_train_epochs",
    "training.max_steps=-5": "training.max_steps is -5; allowed",
    "training.num_train_epochs=0": "training.num_train_epochs is 0; allowed: a number above 0",
    "training.learning_rate=.inf": "training.learning_rate is inf; allowed",
    "training.logging_steps=.inf": "training.logging_steps is inf; allowed: a finite number",
    "training.learning_rate=0": "training.learning_rate is 0; allowed",
    "training.seed=-1": "training.seed is -1; allowed: a whole number of 0 to",
    "training.per_device_train_batch_size=0": "training.per_device_train_batch_size is 0; allowed",
    "training.gradient_accumulation_steps=0": "training.gradient_accumulation_steps is 0; allowed",
    "training.max_length=0": "training.max_length is 0; allowed: at least 2",
    "training.max_steps={a: 1}": "training.max_steps is {'a': 1}; allowed",
    "dataset.seed=-1": "dataset.seed is -1; allowed",
    "evaluation.seed=-1": "evaluation.seed is -1; allowed",
    "adapter.lora_alpha=0": "lora_alpha is 0; allowed: a positive number",
    "adapter.lora_alpha=-2": "lora_alpha is -2; allowed: a positive number",
    "adapter.num_experts=two": "num_experts is 'two'; allowed: a whole number",
    "adapter.balance_coef=1e300": "1e+300; allowed: a number of at least 0",
    "adapter.exclude_modules=[[1]]": "exclude_modules is [[1]]; allowed",
    "adapter.modules_to_save=[5]": "modules_to_save is [5]; allowed",
    "baseline={r: 0}": "baseline.r is 0; allowed",
    "baseline={lora_alpha: -1}": "baseline.lora_alpha is -1.0; allowed",
    'output_dir="a\\0b"': "output_dir is 'a\\x00b'; allowed",
}


@pytest.mark.parametrize("change", NUMBERS)
def test_a_number_that_trains_nothing_is_refused(file: Path, capsys: pytest.CaptureFixture[str], change: str) -> None:
    assert main([str(file), change]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert NUMBERS[change] in line
    assert not (file.parent / "run").exists()


PLACES = {"below a file": "{file}/run", "where nobody writes": "/proc/moelora/run"}


@pytest.mark.parametrize("place", PLACES)
def test_an_output_that_cannot_be_written(file: Path, capsys: pytest.CaptureFixture[str], place: str) -> None:
    assert main([str(file), f"output_dir={PLACES[place].format(file=file)}"]) == 1
    assert "cannot be written: " in capsys.readouterr().err.splitlines()[-1]


def test_arguments_that_the_model_does_not_know(file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "model_kwargs={foo: secret}", f"output_dir={tmp_path}"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert "cannot be loaded with dtype, foo: " in line
    assert "secret" not in line


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.max_length=4", "training.max_length is 4, and the prompt of every row"),
        ("dataset={files: none.jsonl}", "none.jsonl"),
    ],
)
def test_a_run_that_is_refused_for_its_rows_leaves_its_folder_as_it_was(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: str, message: str
) -> None:
    assert main([str(file), change, f"output_dir={tmp_path / 'new' / 'run'}"]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert not any(tmp_path.iterdir())
    (tmp_path / "config.yaml").write_text("model: another\n")
    assert main([str(file), change, f"output_dir={tmp_path}"]) == 1
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("config.yaml", "model: another\n")]


def test_training_that_diverges_ends_with_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(write_run(tmp_path)), "training.learning_rate=1e30"]) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: the loss is nan in step 2, batch 1 of the step (2 rows of ")
    assert not (tmp_path / "run/adapter").exists()


def test_a_full_disk_is_said_in_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No file can grow beyond 20,000 bytes: the checkpoint's optimizer does not fit."""
    file = str(write_run(tmp_path))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        assert main([file]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "Is there space, and the right to read and write?" in capsys.readouterr().err.splitlines()[-1]
    assert main([file]) == 0  # what is half-written is not resumed from


FULL = {
    "torch on a GPU": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    "torch on a CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
    "Python": MemoryError(),
}


@pytest.mark.parametrize("error", FULL)
def test_full_memory_names_the_settings_that_lower_it(error: str, capsys: pytest.CaptureFixture[str]) -> None:
    def work() -> None:
        raise FULL[error]

    assert exit_status(work, stopped="") == 1
    (line,) = capsys.readouterr().err.splitlines()
    for setting in ("per_device_train_batch_size", "max_length", "activation_checkpointing: true", "batch_size"):
        assert setting in line.partition("Memory is full: lower ")[2]


class Send(TrainerCallback):
    """Sends a signal to this process in the midst of a step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_ends_training_with_a_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    number = getattr(signal, name)
    for place in ("whole", "stopped"):
        (tmp_path / place).mkdir()
    whole, stopped = (str(write_run(tmp_path / place)) for place in ("whole", "stopped"))
    assert main([whole]) == 0
    ours = signal.signal(number, signal.SIG_DFL)  # as a shell leaves it, also where nohup runs the tests
    with monkeypatch.context() as patch:
        make = sft.make_trainer

        def with_signal(*args: Any, **kwargs: Any) -> Any:
            trainer = make(*args, **kwargs)
            trainer.add_callback(Send(number))
            return trainer

        patch.setattr(sft, "make_trainer", with_signal)
        assert main([stopped]) == 128 + number
    assert signal.getsignal(number) is signal.SIG_DFL
    signal.signal(number, ours)
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"{name}: Stopped. Run the same command again to resume")
    run = tmp_path / "stopped/run"
    assert not (run / "adapter").exists()
    assert (run / "checkpoints/adapter/checkpoint-3").is_dir()
    assert main([stopped]) == 0
    expected, found = load_file(tmp_path / "whole" / WEIGHTS), load_file(tmp_path / "stopped" / WEIGHTS)
    assert all(tensor.equal(found[key]) for key, tensor in expected.items())


def test_fsdp_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make = sft.make_trainer

    def sharding(*args: Any, **kwargs: Any) -> Any:
        trainer = make(*args, **kwargs)
        trainer.is_fsdp_enabled = True  # a single process on a CPU never has it
        return trainer

    monkeypatch.setattr(sft, "make_trainer", sharding)
    assert main([str(write_run(tmp_path))]) == 1
    assert "FSDP is on (training.fsdp, or --use_fsdp of accelerate)" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("checkpoints/*/checkpoint-*"))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_kill_while_the_adapter_is_written(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The last checkpoint is there: nothing is trained again, and what the kill has left is gone."""
    words = [str(write_run(tmp_path)), f"adapter_dtype={dtype}"]
    assert main(words) == 0
    expected, run = load_file(tmp_path / WEIGHTS), tmp_path / "run"
    shutil.rmtree(run / "adapter")
    (run / ".adapter-0123abcd.part" / "adapter").mkdir(parents=True)
    (run / ".config.yaml-0123abcd.part").write_text("half")
    capsys.readouterr()
    assert main(words) == 0
    found = load_file(tmp_path / WEIGHTS)
    assert all(tensor.equal(found[key]) and tensor.dtype == found[key].dtype for key, tensor in expected.items())
    assert json.loads((run / "adapter/training.json").read_text())["steps"] == 4
    assert "step 5" not in capsys.readouterr().out
    assert {path.name for path in run.iterdir()} == {"adapter", "checkpoints", "config.yaml", "rows.json"}
