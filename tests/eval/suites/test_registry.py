from __future__ import annotations

from pathlib import Path

import pytest

from eval.suites.registry import COMMONSENSE, PROTOCOLS, load_suite
from moelora.errors import RunError
from tests.runs.tiny import tiny_tokenizer

TASK = """
task: my_sums
custom_dataset: !function {module}.rows
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: gold
doc_to_choice: ["one", "two"]
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
"""
ROWS = """
from datasets import Dataset, DatasetDict

def rows(**_):
    return DatasetDict({"validation": Dataset.from_list([{"question": f"{i}?", "gold": i % 2} for i in range(3)])})
"""


def write_task(folder: Path) -> Path:
    """A user's own task, with its rows beside it."""
    (folder / "my_rows.py").write_text(ROWS)
    file = folder / "my_task.yaml"
    file.write_text(TASK.format(module="my_rows"))
    return file


@pytest.mark.usefixtures("commonsense")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_eight_tasks_in_each_protocol(protocol: str) -> None:
    suite = load_suite("commonsense", protocol)
    assert [task.removeprefix("moelora_").removesuffix(f"_{protocol}") for task in suite.tasks] == list(COMMONSENSE)
    labels = [suite.label(task) for task in suite.tasks]
    assert labels == ["ARC-e", "ARC-c", "BoolQ", "OBQA", "SIQA", "WinoGrande", "PIQA", "HellaSwag"]
    normed = {suite.label(task) for task in suite.tasks if suite.metric(task) == "acc_norm"}
    assert normed == ({"ARC-e", "ARC-c", "OBQA", "PIQA", "HellaSwag"} if protocol == "loglik" else set())
    for task in suite.tasks.values():
        assert task.config.metadata["protocol"] == protocol
        assert suite.metric(task.config.task) in task.aggregation()
        expected = "generate_until" if protocol == "instruct" else "multiple_choice"
        assert expected == task.OUTPUT_TYPE
    assert load_suite("commonsense").protocol == "loglik"


@pytest.mark.usefixtures("commonsense")
def test_letters_are_single_tokens_after_a_space_on_the_rows_own_labels() -> None:
    suite = load_suite("commonsense", "letters")
    task = suite.tasks["moelora_arc_easy_letters"]
    rows = task.training_docs()
    assert task.doc_to_choice(rows[1]) == ["1", "2", "3", "4"]
    assert task.doc_to_choice(rows[2]) == ["A", "B", "C"]
    request = task.construct_requests(rows[2], task.doc_to_text(rows[2]), metadata=("t", 0, 1))[0]
    assert request.args[1] == " A"
    assert tiny_tokenizer().decode(tiny_tokenizer()(request.args[1])["input_ids"]) == " A"


def test_the_suite_over_reasoning_gym() -> None:
    suite = load_suite("reasoning")
    assert suite.protocol == "generate"
    assert "chain_sum" in {suite.label(task) for task in suite.tasks}
    assert len(suite.tasks) >= 4
    for task in suite.tasks.values():
        rows = task.validation_docs()
        assert len(set(rows["prompt"])) == len(rows) > 90
        right = task.process_results(rows[0], [f" {rows[0]['answer']}\n"])
        assert right == {"exact": 1.0, "verifier_score": 1.0}
        assert task.process_results(rows[0], ["?"])["exact"] == 0.0


def test_a_users_own_file(tmp_path: Path) -> None:
    suite = load_suite(str(write_task(tmp_path)))
    assert suite.protocol == "lm-eval"
    assert list(suite.tasks) == ["my_sums"]
    assert suite.label("my_sums") == "my_sums"
    assert suite.metric("my_sums") == "acc"


@pytest.mark.usefixtures("few_tasks_of_lm_eval")
@pytest.mark.parametrize(
    ("name", "protocol", "message"),
    [
        ("commonsense", "regex", "protocol 'regex' is unknown; allowed: loglik, letters, instruct"),
        ("reasoning", "loglik", "--protocol loglik belongs to the suite commonsense"),
        ("missing/task.yaml", None, "there is no such file"),
        ("arc_eazy", None, "suite 'arc_eazy' is unknown.*did you mean 'arc_easy'"),
    ],
)
def test_what_there_is_not_is_refused(name: str, protocol: str | None, message: str) -> None:
    with pytest.raises(RunError, match=message):
        load_suite(name, protocol)
