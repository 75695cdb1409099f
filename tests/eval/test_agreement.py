"""Our task definitions against those of the installed lm-eval, on the same rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval import simple_evaluate

from eval.agreement import main
from eval.scoring import agreement
from eval.scoring.agreement import compare
from eval.scoring.scorer import Scorer
from eval.scoring.suite_scores import lean_lm_eval
from eval.suites.registry import load_suite
from moelora.runs.models import ModelSource, load_model, load_tokenizer
from tests.runs.tiny import tiny_folder


def _check(model: str, rows_a_task: int, **words: Any) -> None:
    source = ModelSource(model, **words)
    rows = compare(load_model(source).eval(), load_tokenizer(source), limit=rows_a_task, batch_size=8)
    assert [row["official"] for row in rows] == [
        "arc_easy",
        "arc_challenge",
        "boolq",
        "openbookqa",
        "social_iqa",
        "winogrande",
        "piqa",
        "hellaswag",
    ]
    for row in rows:
        assert row["n"] == rows_a_task
        assert row["ours"] == row["theirs"], row
        assert row["identical"], row
    # a model that scores the same everywhere would agree with anything
    assert len({json.dumps(row["ours"]) for row in rows}) > 2


@pytest.mark.usefixtures("commonsense")
def test_every_request_and_score_is_that_of_lm_evals_own_task(tmp_path: Path) -> None:
    _check(str(tiny_folder(tmp_path)), 6, dtype="float32")


@pytest.mark.real_model
@pytest.mark.usefixtures("commonsense")
def test_on_the_real_model() -> None:
    _check("smollm2-135m-instruct", 2)


@pytest.mark.usefixtures("commonsense")
def test_a_difference_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def with_another_prompt(task: Any) -> Any:
        found = original(task)
        if task.config.task == "moelora_boolq":
            found.config.doc_to_text = "{{passage}}\nQuestion: {{question}}\nAnswer:"
        return found

    original = agreement.official_task
    monkeypatch.setattr(agreement, "official_task", with_another_prompt)
    written = tmp_path / "agreement.json"
    assert main(["--model", str(tiny_folder(tmp_path)), "--limit", "2", "--write", str(written)]) == 1
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| ")]
    assert [line.split("|")[1].strip() for line in lines if "NO" in line] == ["boolq"]
    assert [row["identical"] for row in json.loads(written.read_text())["tasks"]].count(False) == 1


@pytest.mark.usefixtures("commonsense")
def test_there_is_an_official_task_for_each_of_ours() -> None:
    assert list(load_suite("commonsense").tasks) == list(agreement.OFFICIAL)


@pytest.mark.usefixtures("commonsense")
def test_logits_of_the_answers_alone_give_the_same_scores(tmp_path: Path) -> None:
    """`short_logits` leaves out what lm-eval does not read."""
    source = ModelSource(str(tiny_folder(tmp_path)), dtype="float32")
    model, tokenizer = load_model(source).eval(), load_tokenizer(source)
    suite = load_suite("commonsense")
    widths: list[int] = []

    def note(head: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        widths.append(output.shape[1])
        assert inputs[0].is_contiguous(), "torch copies the head for each row of a slice"

    model.lm_head.register_forward_hook(note)
    found, seen = [], []
    for short in (False, True):
        scorer = Scorer(model, tokenizer, batch_size=4, short_logits=short)
        with lean_lm_eval():
            found.append(
                simple_evaluate(
                    model=scorer, tasks=list(suite.tasks.values()), task_manager=suite.manager, bootstrap_iters=0
                )
            )
        seen.append(sum(widths))
        widths.clear()
    assert seen[1] < seen[0] / 1.5
    for task in suite.tasks:
        for a, b in zip(found[0]["samples"][task], found[1]["samples"][task], strict=True):
            values = [[response[0][0] for response in sample["resps"]] for sample in (a, b)]
            assert values[0] == pytest.approx(values[1], abs=1e-4)
            assert [r[0][1] for r in a["resps"]] == [r[0][1] for r in b["resps"]]
