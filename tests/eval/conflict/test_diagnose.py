"""`moelora diagnose` as a whole, on two tasks that ask the same questions and want opposite answers."""

from __future__ import annotations

import json
import shlex
import shutil
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import torch
from PIL import Image

from eval.conflict.__main__ import main as conflict
from eval.conflict.measure import conflict as measured
from eval.conflict.run import LOCK
from eval.conflict.split import split_rows
from eval.page import build_report
from eval.scoring.losses import row_losses
from moelora.compose.tokens import tokenize
from moelora.runs.config import load_config
from moelora.runs.data import load_rows
from moelora.runs.models import load_adapter, load_model, load_tokenizer
from moelora_cli import main
from tests.compose.mixtures import saved
from tests.runs.tiny import write_run
from tests.train.test_sft import StopAfter
from train import sft

TASKS = ("no", 'yes <b>"loud"</b>')
STEPS = 60
TRAINING: dict[str, Any] = {
    "max_steps": STEPS,
    "per_device_train_batch_size": 6,
    "learning_rate": 0.02,
    "logging_steps": 30,
    "save_steps": 10,
    "dataloader_pin_memory": False,
}


def write_tasks(folder: Path) -> Path:
    """The YAML file of a run on questions that one task answers with yes and the other with no."""
    rows = [
        {"prompt": f"{number}?", "completion": answer, "task": task}
        for task, answer in zip(TASKS, "ny", strict=True)
        for number in range(30)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = write_run(
        folder,
        dataset={"files": str(folder / "rows.jsonl"), "chat": False},
        adapter={"preset": "lora", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"},
        training=TRAINING,
    )
    model = load_model(load_config(file))
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # a random head is too weak for any answer to become likely
    model.save_pretrained(folder / "model")
    return file


def adapter_of(model: Any) -> dict[str, torch.Tensor]:
    """What is trained of a model, as it is now."""
    named = model.named_parameters()
    return {name: each.detach().clone() for name, each in named if each.requires_grad}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run and of its diagnosis, which was stopped once within a training of an own LoRA."""
    folder = tmp_path_factory.mktemp("diagnosis")
    words = [str(write_tasks(folder)), "--rates", "1", "--out", str(folder / "out")]
    with pytest.MonkeyPatch.context() as patch:
        start, calls = sft.RunTrainer.train, 0

        class Stop(StopAfter):
            step = 13

        def interrupted(self: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == 3:
                torch.save(adapter_of(self.model), folder / "start.pt")
            if calls == 4:  # the probe trains twice, then come the shared LoRA and the first of the own ones
                self.add_callback(Stop())
            return start(self, *args, **kwargs)

        patch.setattr(sft.RunTrainer, "train", interrupted)
        assert main(["diagnose", *words]) == 130
    before = {path: path.stat().st_mtime_ns for path in (folder / "out").glob("scores/*.json")}
    assert {path.name for path in before} == {"base.json", "shared-1x-selection.json", "shared-1x.json"}
    assert not (folder / "out" / "diagnosis.json").exists()
    assert main(["diagnose", *words]) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before
    return folder


@pytest.fixture(scope="module")
def found(finished: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((finished / "out/diagnosis.json").read_text())
    return content


@pytest.fixture(scope="module")
def losses(finished: Path) -> dict[str, dict[str, list[float]]]:
    """Losses of the scored rows, by adapter and task, without what the program has kept."""
    config = load_config(finished / "run.yaml")
    tokenizer = load_tokenizer(config)
    scored = split_rows(load_rows(config.dataset, tokenizer), 0.3, config.dataset.seed).scored
    examples = {task: tokenize(rows, tokenizer) for task, rows in scored.items()}
    models = {"base": load_model(config).eval()}
    for stage in ("shared-1x-1", "own-1x-1", "own-1x-2", "random-1x-1", "random-1x-2"):
        models[stage] = load_adapter(load_model(config), str(finished / "out/stages" / stage)).eval()
    return {name: {task: row_losses(model, own) for task, own in examples.items()} for name, model in models.items()}


def test_it_goes_on_where_it_was_stopped(finished: Path) -> None:
    record = json.loads((finished / "out/stages/own-1x-1/training.json").read_text())
    assert (record["resumed_from"], record["steps"]) == ("checkpoint-10", STEPS // 2)
    assert not list((finished / "out/checkpoints").rglob("checkpoint-*"))


def test_the_conflict_before_training_is_that_of_the_start_that_was_trained(
    finished: Path, found: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def conflict_of(model: Any, examples: Any) -> Any:
        seen.append(adapter_of(model))
        return measured(model, examples)

    out = tmp_path / "out"
    shutil.copytree(finished / "out", out)
    for name in ("diagnosis.json", "scores/conflict-start.json"):
        (out / name).unlink()
    monkeypatch.setattr("eval.conflict.arms.conflict", conflict_of)
    torch.manual_seed(1234)  # a process that was stopped goes on in another state of chance
    assert main(["diagnose", str(finished / "run.yaml"), "--rates", "1", "--out", str(out)]) == 0
    trained = torch.load(finished / "start.pt")
    (start,) = seen
    assert start.keys() == trained.keys()
    assert all(torch.equal(start[name], trained[name]) for name in trained)
    assert json.loads((out / "diagnosis.json").read_text())["conflict"]["start"] == found["conflict"]["start"]


def test_a_folder_that_another_process_is_at_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished / "out"
    words = [str(finished / "run.yaml"), "--rates", "1", "--out", str(out)]
    fcntl = pytest.importorskip("fcntl")
    with (out / LOCK).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for more in ([], ["--restart"]):
            assert conflict([*words, *more]) == 1
            assert "is taken: another `moelora diagnose` is at it. Wait" in capsys.readouterr().err
        assert conflict([*words, "--plan"]) == 0
        with monkeypatch.context() as patch:
            patch.setattr("moelora.files.fcntl", None)  # a system without locks
            assert conflict(words) == 0
    assert (out / "diagnosis.json").is_file()
    assert conflict(words) == 0


def test_opposite_answers_leave_headroom(found: dict[str, Any]) -> None:
    assert found["verdict"]["kind"] == "separate"
    for task in TASKS:
        headroom = found["tasks"][task]["headroom"]
        assert headroom["value"] > 0.1
        assert headroom["value"] > 5 * headroom["stderr"]
    # as much as two random parts do, which both have both answers
    assert abs(found["mean"]["partition"]["value"]) < found["mean"]["headroom"]["value"]
    assert found["mean"]["told_apart"] == pytest.approx(0.5)
    assert found["transfer"]["share"] < 0.5


def test_the_numbers_are_those_of_the_adapters(
    found: dict[str, Any], losses: dict[str, dict[str, list[float]]]
) -> None:
    for index, task in enumerate(TASKS, 1):
        line = found["tasks"][task]
        shared, own = losses["shared-1x-1"][task], losses[f"own-1x-{index}"][task]
        random = [fmean(pair) for pair in zip(losses["random-1x-1"][task], losses["random-1x-2"][task], strict=True)]
        differences = [a - b for a, b in zip(shared, own, strict=True)]
        assert line["base"] == pytest.approx(fmean(losses["base"][task]), rel=1e-5)
        assert line["shared"] == pytest.approx(fmean(shared), rel=1e-4)
        assert line["own"] == pytest.approx(fmean(own), rel=1e-4)
        assert line["random"] == pytest.approx(fmean(random), rel=1e-4)
        assert line["headroom"]["value"] == pytest.approx(fmean(differences), rel=1e-3)
        assert line["headroom"]["stderr"] == pytest.approx(stdev(differences) / len(differences) ** 0.5, rel=1e-2)
        assert line["rows"] == {"train": 21, "selection": 3, "scored": 6}
        for other, of in enumerate(TASKS, 1):
            expected = fmean(losses[f"own-1x-{other}"][task]) - fmean(losses["base"][task])
            assert found["transfer"]["against_base"][of][task] == pytest.approx(expected, rel=1e-3)


def test_what_is_left_behind(finished: Path, found: dict[str, Any]) -> None:
    out = finished / "out"
    for name in ("conflict.png", "transfer.png"):
        with Image.open(out / name) as picture:
            assert min(picture.size) > 150
    readme = (out / "README.md").read_text()
    assert found["verdict"]["text"] in readme
    assert "| mean | 12 |" in readme
    assert "<b>" not in readme
    receipt = found["receipt"]
    assert receipt["command"].startswith(f"moelora diagnose {finished / 'run.yaml'}")
    assert receipt["seeds"] == {"training": 42, "rows": 0}
    assert receipt["config"]["training"]["max_steps"] == STEPS
    assert set(found["conflict"]) == {"start", "end"}
    assert found["arms"]["shared"]["rank"] == 2 * found["arms"]["own"]["rank"] == 8


def test_the_page_shows_it_and_escapes_names(finished: Path, found: dict[str, Any]) -> None:
    text = build_report(finished / "out", finished / "page.html").read_text()
    assert found["verdict"]["text"] in text
    assert "Diagnosis on model" in text
    assert "<b>" not in text
    assert text.count("yes &lt;b&gt;&#34;loud&#34;&lt;/b&gt;") >= 7  # the table, and twice in each matrix
    assert text.count("<caption>") == 5
    assert f"{found['tasks'][TASKS[0]]['headroom']['value']:+.3f}" in text
    assert "No scores yet" not in text
    assert "moelora compose" in text


def test_the_command_that_it_gives_works(finished: Path, found: dict[str, Any]) -> None:
    (step,) = found["next"]  # such a name cannot be that of a stage of `recipe: sequential`
    program, *words = shlex.split(step["command"])
    assert program == "moelora"
    assert words[words.index("--router") + 1] == "task"
    assert main(words) == 0
    config = json.loads((finished / "out/composed/adapter_config.json").read_text())
    assert config["experts"]["names"] == ["no", "yes_b_loud_b"]


def test_a_second_call_does_nothing_and_another_one_is_refused(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = finished / "out"
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    diagnosis = (out / "diagnosis.json").read_text()
    monkeypatch.setattr(sft.RunTrainer, "train", None)
    words = [str(finished / "run.yaml"), "--rates", "1", "--out", str(out)]
    assert main(["diagnose", *words, "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == json.loads(diagnosis)
    assert "The diagnosis is there already" in printed.err
    # another margin is another verdict on the same numbers
    assert conflict([*words, "--margin", "50", "training.logging_steps=1"]) == 0
    assert "Verdict   A LoRA is enough: LoRAs by task gain less than 50 nats." in capsys.readouterr().out
    assert conflict(words) == 0
    assert "Verdict   Keep separate LoRAs and compose" in capsys.readouterr().out
    for change, message in (
        (["training.learning_rate=0.5"], "training.learning_rate: 0.02 -> 0.5"),
        (["--rates", "1", "3"], "plan.rates.3: None -> 0.06"),
        (["--held-out", "0.4"], "held_out: 0.3 -> 0.4"),
        (["dataset.seed=1"], "rows.sha256"),
    ):
        assert conflict([*words, *change]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert "--restart to throw the old one away" in error
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        ({"tasks": {"gcd": {}}, "rows_per_task": 40}, "all rows are of the task 'gcd'"),
        ({"tasks": {"gcd": {}, "lcm": {}}, "rows_per_task": 9}, "too few rows at a held-out share of 0.3"),
    ],
)
def test_rows_that_do_not_do_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dataset: dict[str, Any], message: str
) -> None:
    assert main(["diagnose", str(write_run(tmp_path, dataset=dataset)), "--out", str(tmp_path / "out")]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_that_is_trained_further_is_refused(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(tmp_path / "mixture", "mixlora")
    words = [f"adapter={{path: {tmp_path / 'mixture'}}}", "--out", str(tmp_path / "out")]
    # adapter is replaced as a whole: with path there may be no other word
    assert main(["diagnose", str(finished / "run.yaml"), *words]) == 1
    assert "allowed: adapter.preset" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_with_something_else_is_left_alone(
    tmp_path: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "README.md").write_text("mine")
    assert main(["diagnose", str(finished / "run.yaml"), "--out", str(tmp_path)]) == 1
    assert "has something in it that is no diagnosis" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]
