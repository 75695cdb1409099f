"""What docs/diagnose.md says runs as it stands, on a tiny model in place of a real one."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from eval.conflict.advice import Place, next_steps
from eval.conflict.arms import Found
from eval.conflict.plan import Options, Plan
from eval.conflict.verdict import Kind, Verdict
from moelora.runs.config import load_config
from moelora_cli import main
from tests.runs.tiny import write_run
from train.__main__ import main as train

DOCS = Path(__file__).parents[3] / "docs"
OUT = Path("runs/diagnose/run")


def test_diagnose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = {"gcd": {"max_value": 300}, "letter_counting": {"min_words": 2, "max_words": 3}}
    training = {"max_steps": 2, "per_device_train_batch_size": 2, "dataloader_pin_memory": False}
    write_run(tmp_path, dataset={"tasks": tasks, "rows_per_task": 24, "system": "Reply."}, training=training)
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```bash\n(.*?)```", (DOCS / "diagnose.md").read_text(), flags=re.DOTALL)
    plan, diagnose, report = (shlex.split(line, comments=True) for line in block.splitlines())
    assert main(plan[1:]) == 0
    said = capsys.readouterr().out
    assert "Plan      10 trainings, 12 steps in all" in said
    assert "Cost      about " in said
    assert not Path("runs").exists()
    assert main(diagnose[1:]) == 0
    assert "Verdict   " in capsys.readouterr().out
    assert main(report[1:]) == 0
    found = json.loads((OUT / "diagnosis.json").read_text())
    assert (OUT / "report.html").read_text().count(found["verdict"]["text"]) == 1

    # whatever the verdict was, each has commands that work
    words = json.loads((OUT / "plan.json").read_text())["plan"]
    tuples = {"tasks": tuple(words["tasks"]), "part_steps": tuple(words["part_steps"])}
    made = Plan(**{**words, **tuples, "dropout": 0.25})
    best = {"shared": "2", "own": "1", "random": "1"}
    measured = Found(best, {}, {"gcd": [1.0] * 9}, {}, {}, {"gcd": 1.0})
    place = Place(("run.yaml", "output_dir=runs/next"), OUT)
    config = load_config("run.yaml")
    kinds: tuple[Kind, ...] = ("lora", "separate", "mixture", "undecided")
    for kind in kinds:
        steps = next_steps(Verdict(kind, "", [], 5), made, measured, config, place, Options(rates=(1.0, 2.0, 4.0)))
        if kind == "undecided":
            assert steps[0]["command"].endswith(f"dataset.rows_per_task=38 --out {OUT}-more --rates 1 2 4")
            assert main([*shlex.split(steps[0]["command"])[1:], "--plan"]) == 0
            continue
        for number, step in enumerate(steps):
            program = shlex.split(step["command"])
            if program[:2] == ["moelora", "compose"]:
                place_of = f"composed-{kind}-{number}"
                assert main([*program[1:-1], place_of]) == 0
                adapter = json.loads(Path(place_of, "adapter_config.json").read_text())
                assert adapter["scores"]["kind"] == "centroids"
                assert adapter["selection"] == {"kind": "nearest", "threshold": False}  # as `told_apart` counts
            else:
                assert program[:2] == ["moelora", "train"]
                output = f"output_dir=runs/{kind}-{number}"
                assert train([*program[2:], output]) == 0
