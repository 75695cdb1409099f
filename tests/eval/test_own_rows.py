"""`moelora eval` on rows of the user's: those that a run kept from training, and those of files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from eval.__main__ import main
from eval.page import build_report
from eval.scoring.losses import row_losses
from eval.scoring.own_tasks import problems_of_rows
from eval.scoring.sources import Contestant
from moelora.runs.config import load_config
from moelora.runs.data import load_rows
from moelora.runs.models import load_tokenizer
from tests.runs.tiny import write_run
from train.__main__ import main as train

TABLE = {"preset": "moelora_task", "r": 4, "lora_alpha": 8, "num_experts": 2, "num_tasks": 2}


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    # answers that can be learnt: the letter of the task
    return [
        {"prompt": f"{'copy' if n % 2 else 'turn'} {n}", "completion": "xy"[n % 2], "task": "ba"[n % 2]}
        for n in range(start, start + count)
    ]


def write_rows(file: Path, given: list[dict[str, Any]]) -> str:
    file.write_text("\n".join(map(json.dumps, given)))
    return str(file)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    data = {"files": write_rows(folder / "rows.jsonl", rows(40)), "held_out": 0.2, "system": "Reply."}
    training = {
        "max_steps": 30,
        "per_device_train_batch_size": 8,
        "learning_rate": 0.02,
        "dataloader_pin_memory": False,
    }
    file = write_run(folder, dataset=data, baseline={"r": 4}, training=training)
    assert train([str(file)]) == 0
    return folder / "run"


def test_a_run_is_scored_on_what_it_held_out(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "a: 4 rows" in shown
    assert "Loss of an answer's token in nats" in shown
    found = json.loads((run / "metrics.json").read_text())
    assert found["suite"] == "rows"
    scores = {(row["task"], row["model"]): row for row in found["scores"]}
    ours = list(found["models"])[-1]
    assert scores["a", ours] == {**scores["a", ours], "metric": "exact", "value": 1.0, "n": 4}
    assert scores["mean of tasks", "base"]["value"] == 0.0
    assert found["losses"]["b"][ours]["value"] < found["losses"]["b"]["base"]["value"]
    report = (run / "report.md").read_text()
    assert "letter for letter" in report
    assert "Loss of an answer's token in nats" in report
    assert json.loads((run / "adapter/metrics.json").read_text()) == found
    page = build_report(run).read_text()
    assert "Loss of an answer's token in nats" in page
    assert f"{found['losses']['b'][ours]['value']:.3f} <small>" in page


def test_the_loss_is_that_of_the_answer_in_the_context_of_training(run: Path) -> None:
    config = load_config(run / "config.yaml")
    tokenizer = load_tokenizer(config)
    held = load_rows(config.dataset, tokenizer, held_out=True)
    (task, _) = problems_of_rows(held, tokenizer, ["a", "b"])
    assert tokenizer.decode(task.prompts[0]).startswith("<|system|>Reply.<|end|><|user|>copy ")
    assert tokenizer.decode(task.prompts[0]).endswith("<|end|><|assistant|>")
    model = Contestant("base", "base").load(config)
    ids = torch.tensor([[*task.prompts[0], *tokenizer("y<|end|>")["input_ids"]]])
    with torch.no_grad():
        log_p = model(ids).logits[0].log_softmax(-1)
    at = len(task.prompts[0])
    expected = -(log_p[at - 1, ids[0, at]] + log_p[at, ids[0, at + 1]]) / 2
    assert row_losses(model, task.examples)[0] == pytest.approx(expected.item(), abs=1e-5)


def test_rows_of_a_file_and_an_adapter_without_a_run(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    new = write_rows(tmp_path / "new rows.jsonl", rows(6, start=100))
    earlier = (run / "metrics.json").read_text() if (run / "metrics.json").is_file() else None
    assert main([str(run), "--data", new, "--limit", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((run / "results/new rows/metrics.json").read_text())
    assert {row["n"] for row in found["scores"] if row["task"] == "a"} == {2}
    assert "--data '" in found["receipt"]["command"]
    assert earlier == ((run / "metrics.json").read_text() if (run / "metrics.json").is_file() else None)

    # as a composition would be scored: beside other adapters of the same base
    adapter, other = str(run / "adapter"), str(run / "baseline")
    model = ["--model", str(run.parent / "model")]
    assert main([adapter, "--data", new, *model, "--beside", other, "--beside", other, "--json"]) == 0
    names = list(json.loads(capsys.readouterr().out)["models"])
    assert names[0] == "base"
    assert [name.endswith(f"({other})") for name in names] == [False, True, True, False] or len(set(names)) == 3


def test_an_adapter_that_routes_by_task_has_the_numbers_of_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"files": write_rows(tmp_path / "rows.jsonl", rows(16)), "held_out": 0.2}
    assert train([str(write_run(tmp_path, dataset=data, adapter=TABLE))]) == 0
    one = write_rows(tmp_path / "b.jsonl", [row for row in rows(4, 50) if row["task"] == "b"])
    assert main([str(tmp_path / "run"), "--data", one]) == 0
    other = write_rows(tmp_path / "c.jsonl", [{**row, "task": "c"} for row in rows(4)])
    capsys.readouterr()
    assert main([str(tmp_path / "run"), "--data", other]) == 1
    assert "it is not known which number 'c' had in training" in capsys.readouterr().err


def test_the_stages_of_a_sequential_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = {"files": write_rows(tmp_path / "rows.jsonl", rows(16)), "held_out": 0.25}
    adapter = {"preset": "lora", "r": 2, "lora_alpha": 4}
    file = write_run(tmp_path, dataset=data, adapter=adapter, recipe="sequential", sequential={"order": ["b", "a"]})
    assert train([str(file), "training.max_steps=2"]) == 0
    root = tmp_path / "run"
    capsys.readouterr()
    assert main([str(root), "--stages", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((root / "metrics.json").read_text())
    stage = json.loads((root / "stages/1-b/metrics.json").read_text())
    assert {row["task"] for row in stage["scores"]} == {"a", "b", "mean of tasks"}
    assert "stages/1-b" in stage["receipt"]["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.jsonl", "--suite", "commonsense"], "are both given; leave one out"),
        (["--stages", "--suite", "commonsense"], "are both given; leave one out"),
        (["--stages"], "has no stages; allowed with --stages"),
        (["--protocol", "loglik"], "--protocol does not apply to rows"),
        (["--beside", "x.json"], "is a file of results; allowed without --suite: adapters"),
        (["--model", "x"], "is given without --data"),
        (["--data", "{text}"], "texts without prompts, so that there is nothing to answer"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "abc"}])
    config = load_config(run / "config.yaml")
    assert config.dataset.system == "Reply."
    given = [word.replace("{text}", text) for word in words]
    source = str(run / "adapter") if "{text}" in words else str(run)
    more = ["--model", str(run.parent / "model")] if "{text}" in words else []
    assert main([source, *given, *more]) == 1
    assert message in capsys.readouterr().err
