from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval.__main__ import main
from eval.scoring.generation import answer
from tests.runs.tiny import write_run
from train.__main__ import main as train

ADAPTER = {"preset": "mixlora", "r": 24, "lora_alpha": 48, "num_experts": 3, "top_k": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    assert train([str(write_run(folder, adapter=ADAPTER, baseline={}))]) == 0
    return folder / "run"


def test_a_run_is_scored_beside_base_and_baseline(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    shown = capsys.readouterr().out
    assert "task" in shown
    assert f"moelora push {run / 'adapter'}" in shown

    found = json.loads((run / "metrics.json").read_text())
    assert list(found["models"]) == ["base", "LoRA r=49", "MixLoRA"]
    parameters = [model["training"]["trainable_parameters"] for model in found["models"].values() if model["training"]]
    assert abs(parameters[0] / parameters[1] - 1) < 0.02
    rows = {(row["task"], row["metric"], row["model"]): row for row in found["scores"]}
    assert len(rows) == len(found["scores"]) == 2 * 2 * 3 + 3
    assert all(0 <= row["value"] <= 1 and row["stderr"] >= 0 for row in rows.values())
    assert rows["gcd", "exact", "MixLoRA"]["n"] == 5
    assert found["routing"]["layers"] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert found["routing"]["tasks"].keys() == {"gcd", "letter_counting"}
    for load in found["routing"]["load"].values():
        assert [round(sum(layer), 2) for layer in load] == [1.0, 1.0]
    receipt = found["receipt"]
    assert receipt["config"]["adapter"] == ADAPTER
    assert receipt["seeds"] == {"training": 42, "training rows": 0, "evaluation problems": 1_000_000}
    assert json.loads((run / "adapter/metrics.json").read_text()) == found

    report = (run / "report.md").read_text()
    for name in ("overview", "gcd", "letter_counting"):
        assert f"](heatmaps/{name}.png)" in report
        with Image.open(run / "heatmaps" / f"{name}.png") as picture:
            assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 50
    assert "| LoRA r=49 | 50,568 | 4 |" in report


def test_an_adapter_alone_needs_a_configuration(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    adapter = str(run / "baseline")
    assert main([adapter]) == 1
    assert "say what to evaluate it on: pass --config" in capsys.readouterr().err
    assert main([adapter, "--config", str(run.parent / "run.yaml"), "--limit", "2", "--json"]) == 0
    found = json.loads((run / "baseline/metrics.json").read_text())
    shown = capsys.readouterr()
    assert json.loads(shown.out) == found
    assert "Exact answers in percent" in shown.err
    assert {row["n"] for row in found["scores"] if row["metric"] == "verifier score"} == {2}
    assert list(found["models"]) == ["base", "LoRA r=49"]
    assert "routing" not in found


def test_what_cannot_be_scored_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_text((run / "config.yaml").read_text())
    for arguments, message in (
        ([str(tmp_path)], "has no finished adapter"),
        ([str(run.parent)], "is neither a run (no config.yaml) nor an adapter"),
        ([str(run), "--config", "x.yaml"], "has its own config.yaml; leave --config out"),
    ):
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("words", "wanted"), [(["--batch-size", "3"], 3), ([], 5)])
def test_the_batch_size_is_obeyed(run: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], wanted: int) -> None:
    sizes = []

    def noted(*arguments: Any, batch_size: int, **rest: Any) -> Any:
        sizes.append(batch_size)
        return answer(*arguments, batch_size=batch_size, **rest)

    monkeypatch.setattr("eval.scoring.own_tasks.answer", noted)
    assert main([str(run / "adapter"), "--config", str(run.parent / "run.yaml"), "--limit", "2", *words]) == 0
    assert set(sizes) == {wanted}
    command = json.loads((run / "adapter/metrics.json").read_text())["receipt"]["command"]
    assert " ".join(words) in command
    assert ("--batch-size" in command) == bool(words)
