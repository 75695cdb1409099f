"""`moelora init` writes a file that `moelora train` takes."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from moelora.runs.config import load_config
from moelora_cli import main
from tests.runs.tiny import tiny_folder


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    tiny_folder(tmp_path / "model")
    rows = [{"prompt": f"{n} ", "completion": f"{n + 1}", "task": "ab"[n % 2]} for n in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO())
    return tmp_path


def test_a_run_from_init_to_its_end(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "./model", "--data", "rows.jsonl", "--tasks", "together", "--memory", "8"]
    assert main(["init", *words]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "Wrote run.yaml: mixlora on ./model",
        "Next: moelora train run.yaml",
    ]
    assert load_config("run.yaml").baseline is not None
    small = ["training.max_steps=1", "training.max_length=32", "dtype=float32"]
    more = ["training.dataloader_pin_memory=false", "training.gradient_accumulation_steps=1"]
    assert main(["train", "run.yaml", *small, *more, "training.per_device_train_batch_size=2"]) == 0
    assert (place / "runs/run/adapter/adapter_config.json").is_file()
    assert (place / "runs/run/baseline/adapter_config.json").is_file()
    assert "      moelora report runs/run\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tasks", "preset", "expected"),
    [
        ("one", None, ("sft", "lora", None)),
        ("together", "smora", ("sft", "smora", None)),
        ("a, b", None, ("sequential", "lora", ["a", "b"])),
    ],
)
def test_what_it_writes(
    place: Path, tasks: str, preset: str | None, expected: tuple[str, str, list[str] | None]
) -> None:
    words = ["--model", "./model", "--data", "rows.jsonl", "--tasks", tasks, "-o", "in.yaml", "--memory", "4"]
    assert main(["init", *words, *(["--preset", preset] if preset else [])]) == 0
    config = load_config("in.yaml")
    order = config.sequential.order if config.sequential else None
    assert (config.recipe, config.adapter["preset"], order) == expected
    assert (config.dataset.files, config.output_dir) == ("rows.jsonl", "runs/in")
    text = (place / "in.yaml").read_text()
    assert text.count("#") > 10
    assert max(map(len, text.splitlines())) <= 120


def test_little_memory(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "./model", "--data", "rows.jsonl", "--tasks", "one"]
    assert main(["init", *words, "--memory", "0.0001"]) == 0
    assert "GiB, and 0.0001 are given" in capsys.readouterr().out
    training = load_config("run.yaml").training
    assert training["per_device_train_batch_size"] == 1
    assert training["gradient_accumulation_steps"] == 16
    assert training["activation_checkpointing"] is True


def test_it_asks_in_a_terminal(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter(["./model", "rows.jsonl", "one", ""])
    asked: list[str] = []
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)

    def answer(question: str) -> str:
        asked.append(question)
        return next(answers)

    monkeypatch.setattr("builtins.input", answer)
    assert main(["init"]) == 0
    assert [question.split(" (")[0].split(" [")[0] for question in asked] == [
        "Base model",
        "Training rows",
        "Tasks",
        "Memory for training in GiB",
    ]
    assert load_config("run.yaml").model == "./model"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--data rows.jsonl --memory 4", "--model, --tasks not given; allowed: as an option, or as an answer"),
        ("--model ./model --data none.jsonl --tasks one", "the rows none.jsonl are not there"),
        ("--model ./model --data rows.jsonl --tasks sums", "the tasks are 'sums'; allowed: one, together, or two"),
        ("--model ./none --data rows.jsonl --tasks one", "no model in that folder"),
        ("--model ./model --data rows.jsonl --tasks one --preset guess", "unknown preset 'guess'"),
        ("--model ./model --data rows.jsonl --tasks a,b --preset smora", "with tasks in turn; allowed: lora"),
        ("--model ./model --data rows.jsonl --tasks one -o rows.jsonl", "the file 'rows.jsonl' exists"),
    ],
)
def test_what_does_not_do(place: Path, capsys: pytest.CaptureFixture[str], words: str, message: str) -> None:
    assert main(["init", *words.split()]) == 1
    assert message in capsys.readouterr().err
    assert not (place / "run.yaml").exists()


@pytest.mark.parametrize(("small", "rates"), [(5e8, (2e-3, 1e-3)), (0.0, (4e-4, 2e-4))])
def test_the_rates_suit_the_size_of_the_base(
    place: Path, small: float, rates: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A mixture has twice the rate of the LoRA beside it, and a small base five times that of a large one."""
    monkeypatch.setattr("moelora_cli.run_file._SMALL", small)
    words = ["--model", "./model", "--data", "rows.jsonl", "--tasks", "together", "--memory", "4"]
    assert main(["init", *words]) == 0
    config = load_config("run.yaml")
    assert config.baseline is not None
    found = (config.training["learning_rate"], config.baseline.training["learning_rate"])
    assert tuple(map(float, found)) == rates
    assert max(map(len, Path("run.yaml").read_text().splitlines())) <= 120
