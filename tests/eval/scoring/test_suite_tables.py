from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from eval.scoring.judging import FLOOR_MARK
from eval.scoring.model_scores import ModelScores, TaskScores
from eval.scoring.suite_tables import check_comparable, notes, score_table
from moelora.errors import RunError
from moelora.runs.tables import markdown


def task(right: int, n: int = 20, majority: float | None = 0.25, **changes: Any) -> TaskScores:
    values = [1.0] * right + [0.0] * (n - right)
    words: dict[str, Any] = {"metric": "acc", "version": "1.0", "rows": f"hash{n}", "majority": majority}
    return TaskScores(**{**words, "values": values, "metrics": {"acc": {"value": right / n, "stderr": 0.1}}, **changes})


def model(
    name: str, *right: int, kind: str = "base", trainable: int = 0, active: int = 0, **changes: Any
) -> ModelScores:
    words: dict[str, Any] = {
        "name": name,
        "suite": "commonsense",
        "protocol": "loglik",
        "chat": False,
        "limit": 20,
        "tasks": {label: task(count) for label, count in zip(("ARC-e", "BoolQ"), right, strict=True)},
        "parameters": {"trainable": trainable, "active": active or trainable, "base": 1000},
        "seconds": 2.0,
        "tokens": 500,
        "kind": kind,
    }
    return ModelScores(**{**words, **changes})


def three() -> list[ModelScores]:
    return [
        model("base", 10, 5),
        model("LoRA r=4", 12, 8, kind="lora", trainable=400),
        model("MixLoRA", 16, 8, kind="mixlora", trainable=404, active=100),
    ]


def test_a_number_stands_with_all_that_it_takes_to_judge_it() -> None:
    header, rows = score_table(three())
    assert header == ["task", "metric", "n", "majority", "base", "LoRA r=4", "MixLoRA", "MixLoRA - LoRA r=4"]
    assert rows[0] == ["ARC-e", "acc", "20", "25.0", "50.0 ± 11.5", "60.0 ± 11.2", "80.0 ± 9.2", "+20.0 ± 9.2"]
    assert rows[1][4] == f"25.0 ± 9.9 {FLOOR_MARK}"
    assert rows[2] == ["mean of tasks", "", "40", "", "37.5 ± 7.6", "50.0 ± 7.9", "60.0 ± 7.3", "+10.0 ± 4.6"]
    assert rows[3][4:] == ["0", "400", "404", ""]
    assert rows[4][4:] == ["0", "400", "100", ""]
    assert rows[5][4:] == ["250", "250", "250", ""]
    assert all(len(row) == len(header) for row in rows)
    assert markdown(header, rows).count("\n") == 7


def test_notes_name_the_floor_the_missing_control_and_the_difference() -> None:
    found = notes(three())
    assert found[0].startswith(FLOOR_MARK)
    assert found[1].startswith("No LoRA of equal active parameters stands beside MixLoRA")
    assert found[2].startswith("MixLoRA against LoRA r=4: +10.0 ± 4.6 points")
    assert found[2].endswith("MixLoRA is ahead, in one training run each.")
    assert len(found) == 3
    both = [*three()[:2], model("LoRA r=1", 12, 8, kind="lora", trainable=101), three()[2]]
    assert not [note for note in notes(both) if "stands beside" in note]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"protocol": "letters"}, "cannot stand in one table: their protocol differ, 'loglik' and 'letters'"),
        ({"suite": "other"}, "their suite differ"),
        ({"chat": True}, "their chat template differ"),
        ({"tasks": {"ARC-e": task(1)}}, "their tasks differ"),
        (
            {"tasks": {"ARC-e": task(1, 10), "BoolQ": task(1)}},
            r"on ARC-e they were not asked the same \(20 and 10 rows",
        ),
        ({"tasks": {"ARC-e": task(1, version="2.0"), "BoolQ": task(1)}}, "versions 1.0 and 2.0"),
    ],
)
def test_what_was_not_measured_alike_never_shares_a_table(changes: dict[str, Any], message: str) -> None:
    models = [model("a", 1, 1), dataclasses.replace(model("b", 1, 1), **changes)]
    for use in (check_comparable, score_table):
        with pytest.raises(RunError, match=message):
            use(models)


def test_a_free_answer_has_no_floor() -> None:
    free = model("a", 0, 0, tasks={"ARC-e": task(0, majority=None), "BoolQ": task(5)})
    assert not free.tasks["ARC-e"].at_floor
    assert free.tasks["BoolQ"].at_floor
    assert score_table([free])[1][0][3] == "-"


def test_results_survive_their_file(tmp_path: Path) -> None:
    scores = model("MixLoRA", 3, 4, kind="mixlora", tasks={"ARC-e": task(3), "x": task(1, values=[0.25, 1.0])})
    file = scores.write(tmp_path / "deep" / "a.json")
    assert ModelScores.read(file) == scores
    assert '"11100000000000000000"' in file.read_text()
    assert [each.name for each in file.parent.iterdir()] == ["a.json"]


@pytest.mark.parametrize("content", ["", "[]", '{"format": 1}', '{"format": 99}'])
def test_another_file_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(RunError, match="is not a result of `moelora eval --suite`"):
        ModelScores.read(tmp_path / "a.json")
