"""`moelora eval` on rows of the user's: those that a run kept from training, and those of files."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from datasets import Dataset
from peft import LoraConfig, get_peft_model

from eval.__main__ import main
from eval.page import build_report
from eval.scoring.losses import row_losses
from eval.scoring.own_tasks import problems_of_rows, room
from eval.scoring.sources import Contestant, distinct
from moelora import record_routing
from moelora.compose import from_loras
from moelora.errors import RunError
from moelora.runs.config import load_config
from moelora.runs.data import load_rows
from moelora.runs.models import load_tokenizer
from tests.compose.loras import three_loras
from tests.conftest import tiny_model
from tests.runs.tiny import TEMPLATE, tiny_tokenizer, write_run
from train.__main__ import main as train

ROOT = Path(__file__).parents[2]
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
        "max_length": 64,
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
    assert found == json.loads((run / "results/rows-new-rows/metrics.json").read_text())
    assert {row["n"] for row in found["scores"] if row["task"] == "a"} == {2}
    assert "--data '" in found["receipt"]["command"]
    assert earlier == ((run / "metrics.json").read_text() if (run / "metrics.json").is_file() else None)

    # as a composition would be scored: beside other adapters of the same base
    adapter, other = str(run / "adapter"), str(run / "baseline")
    model = ["--model", str(run.parent / "model")]
    assert main([adapter, "--data", new, *model, "--beside", other, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert list(found["models"]) == ["base", "LoRA r=4", "MixLoRA"]
    assert found["models"]["LoRA r=4"]["role"] == "beside"
    assert found["receipt"]["seeds"] == {}
    assert main([adapter, "--data", new, *model, "--beside", other, "--beside", other]) == 1
    assert "is given twice" in capsys.readouterr().err


def test_without_matplotlib_there_are_scores_and_no_pictures(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is no part of what the README installs."""
    monkeypatch.setattr("eval.figures.are_possible", lambda: False)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    new = write_rows(tmp_path / "plain.jsonl", rows(4, start=100))
    assert main([str(run), "--data", new]) == 0
    assert "No pictures of the routing: matplotlib is not installed" in capsys.readouterr().out
    assert not (run / "results/rows-plain/heatmaps").exists()
    assert "![" not in (run / "results/rows-plain/report.md").read_text()
    from eval.compare.__main__ import main as compare

    assert compare([str(ROOT / "configs/benchmarks/rules_8.yaml"), f"output_dir={tmp_path}"]) == 1
    assert "a comparison draws with matplotlib" in capsys.readouterr().err


def test_models_of_one_name_are_told_apart() -> None:
    alike = [Contestant("LoRA r=4", "beside", f"/home/me/{place}/adapter") for place in ("one", "two")]
    found = distinct([Contestant("base", "base"), *alike, Contestant("MixLoRA", "adapter", "x")])
    assert [each.name for each in found] == ["base", "LoRA r=4 (one/adapter)", "LoRA r=4 (two/adapter)", "MixLoRA"]


def test_an_answer_is_what_the_template_makes_of_it() -> None:
    """A template that thinks before it answers: the thoughts are taught, and so they are asked for."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE.replace(
        "<|{{ message['role'] }}|>",
        "<|{{ message['role'] }}|>{% if message['role'] == 'assistant' %}[thought]{% endif %}",
    )
    given = Dataset.from_list(
        [{"messages": [{"role": "user", "content": "2 + 2"}, {"role": "assistant", "content": "4"}]}]
    )
    (task,) = problems_of_rows(given, tokenizer, [])
    assert task.task == "rows"
    assert task.problems[0].prompt == "2 + 2"
    assert task.problems[0].answer == "[thought]4"
    assert room(task, tokenizer) == len("[thought]4") + 1 + 4


def test_the_router_does_not_see_the_answer_whose_loss_it_is(tmp_path: Path) -> None:
    """Routing by sequence looks at the prompt alone, in scoring as in generation."""
    loras = {name: folder for name, folder in three_loras(tmp_path).items() if name != "facts"}
    examples = {"sums": [{"input_ids": [5, 6, 7]}], "words": [{"input_ids": [20, 21, 22]}]}
    router = {"kind": "centroids", "embedding": "input", "unknown": False}
    mixture = from_loras(tiny_model(), loras, router, examples=examples).eval()
    prompt, answer = [5, 6, 7], [20, 21, 22] * 4

    def expert(of: Callable[[], object]) -> int:
        with record_routing(mixture) as found, torch.no_grad():
            of()
        return int(found.records[0].routing.load_TE()[0].argmax())

    labelled = {"input_ids": [*prompt, *answer], "labels": [-100] * 3 + answer}
    asked = expert(lambda: mixture(input_ids=torch.tensor([prompt])))
    assert expert(lambda: row_losses(mixture, [labelled])) == asked
    assert expert(lambda: mixture(input_ids=torch.tensor([[*prompt, *answer]]))) != asked


def test_rows_that_are_not_those_of_the_training_any_more(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    moved = tmp_path / "run"
    shutil.copytree(run, moved)
    words = yaml.safe_load((moved / "config.yaml").read_text())
    words["dataset"]["files"] = write_rows(tmp_path / "more.jsonl", rows(60))
    (moved / "config.yaml").write_text(yaml.safe_dump(words))
    assert main([str(moved)]) == 1
    assert "the training rows are not those of the run" in capsys.readouterr().err
    assert main([str(moved), "--data", words["dataset"]["files"], "--limit", "1"]) == 0
    shown = capsys.readouterr().out
    assert "Note: the run was trained on the prompts of" in shown
    assert "No difference can be told: one problem alone of a" in shown


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


def test_the_stages_of_a_sequential_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"files": write_rows(tmp_path / "rows.jsonl", rows(16)), "held_out": 0.25}
    adapter = {"preset": "lora", "r": 2, "lora_alpha": 4}
    file = write_run(tmp_path, dataset=data, adapter=adapter, recipe="sequential", sequential={"order": ["b", "a"]})
    assert train([str(file), "training.max_steps=2"]) == 0
    root = tmp_path / "run"
    capsys.readouterr()
    loaded: list[str] = []
    load = Contestant.load

    def counted(contestant: Contestant, config: Any) -> Any:
        loaded.append(contestant.role)
        return load(contestant, config)

    monkeypatch.setattr(Contestant, "load", counted)
    assert main([str(root), "--stages", "--json", "evaluation.max_new_tokens=1"]) == 0
    assert loaded == ["base", "adapter", "adapter"]  # the base model is scored once
    whole = json.loads((root / "metrics.json").read_text())
    assert json.loads(capsys.readouterr().out) == whole
    stage = json.loads((root / "stages/1-b/metrics.json").read_text())
    of_base = [[row for row in found["scores"] if row["model"] == "base"] for found in (stage, whole)]
    assert of_base[0] == of_base[1] != []
    assert whole["receipt"]["config"]["evaluation"]["max_new_tokens"] == 1
    assert {row["task"] for row in stage["scores"]} == {"a", "b", "mean of tasks"}
    assert "stages/1-b" in stage["receipt"]["command"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x.jsonl", "--suite", "commonsense"], "are both given; leave one out"),
        (["--stages", "--suite", "commonsense"], "are both given; leave one out"),
        (["--stages", "--data", "x.jsonl"], "leave --data and --beside out"),
        (["--data", " ,"], "--data is ' ,'; allowed: files of rows"),
        (["--stages"], "has no stages; allowed with --stages"),
        (["--protocol", "loglik"], "--protocol does not apply to rows"),
        (["--beside", "x.json"], "is a file of results; allowed without --suite: adapters"),
        (["--model", "x"], "is given without --data"),
        (["adapter.r=8"], "override 'adapter.r=8'; allowed: keys of evaluation, such as evaluation.max_new_tokens=64"),
        (["evaluation.max_new_tokens=0"], "evaluation.max_new_tokens is 0; allowed"),
        (["--suite", "arc_easy", "evaluation.seed=3"], "'evaluation.seed=3' does not apply to a suite"),
        (["--data", "{text}", "dataset.columns={text: body}"], "or drop the mapping, as in `dataset.columns={}`"),
    ],
)
def test_what_is_refused(
    run: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_rows(tmp_path / "text.jsonl", [{"text": "abc"}])
    assert main([str(run), *(text if word == "{text}" else word for word in words)]) == 1
    assert message in capsys.readouterr().err


def test_texts_have_a_loss_and_no_answers(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = [{"text": f"{'copy' if n % 2 else 'turn'} {n} {'xy'[n % 2]}", "task": "ba"[n % 2]} for n in range(4)]
    given[0]["text"] *= 20  # longer than training.max_length
    texts = write_rows(tmp_path / "texts.jsonl", given)
    assert main([str(run), "--data", texts, "dataset.system=null"]) == 0
    shown = capsys.readouterr().out
    assert "The rows are texts without a prompt, so that nothing is asked" in shown
    assert "Exact answers in percent" not in shown
    assert re.search(r"Loss, MixLoRA against LoRA r=4: [+-]\d\.\d{3} ± \d\.\d{3} nats", shown)
    folder = run / "results/rows-texts"
    found = json.loads((folder / "metrics.json").read_text())
    assert found["tasks"]["a"] == {"n": 2, "majority": None, "dropped": 0}
    assert {row["metric"] for row in found["scores"]} == {"loss"}
    assert found["receipt"]["command"].endswith("dataset.system=null")

    # the loss of each token but the first, up to the run's max_length or with the end of the text, as in training
    tokenizer = load_tokenizer(load_config(run / "config.yaml"))
    model = Contestant("base", "base").load(load_config(run / "config.yaml"))
    losses = []
    for row in (row for row in given if row["task"] == "a"):
        ids = torch.tensor([tokenizer(f"{row['text']}<|end|>")["input_ids"][:64]])
        with torch.no_grad():
            losses.append(float(model(ids, labels=ids).loss))
    assert found["losses"]["a"]["base"]["value"] == pytest.approx(sum(losses) / 2, abs=1e-5)
    (first, _) = problems_of_rows(Dataset.from_list(given), tokenizer, [], longest=3)
    assert [len(example["labels"]) for example in first.examples] == [3, 3]
    mixed = Dataset.from_list([{"messages": [{"role": "user", "content": "a"}] * count} for count in (1, 2)])
    with pytest.raises(RunError, match="1 of 2 rows have a prompt, and the others have none"):
        problems_of_rows(mixed, tokenizer, [])

    page = build_report(run).read_text()
    assert "Loss of a text's token in nats" in page
    assert "<caption>Scores in percent, rows-texts" not in page


def test_another_base_is_found_before_time_is_spent(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = get_peft_model(tiny_model("llama", hidden_size=48), LoraConfig(target_modules=["q_proj"]))
    other.save_pretrained(str(tmp_path / "other"))
    assert main([str(run), "--beside", str(tmp_path / "other")]) == 1
    shown = capsys.readouterr()
    assert "cannot be loaded on" in shown.err
    assert "Allowed: an adapter of this base model." in shown.err
    assert "exact" not in shown.out
