from __future__ import annotations

from typing import Any

import pytest

from eval.compare.mixture import IGNORED, Mixture, as_dataset, digest, make_mixture, padded
from eval.compare.schema import DataConfig
from eval.scoring.scorer import Scorer
from eval.scoring.suite_scores import lean_lm_eval, score_suite
from eval.suites.registry import PROTOCOLS, load_suite
from eval.suites.requests import right_request
from moelora.runs.models import ModelSource, load_model, load_tokenizer
from tests.runs.tiny import tiny_folder

TASKS = ["arc_easy", "boolq", "winogrande"]


@pytest.fixture(scope="module")
def scorer(tmp_path_factory: pytest.TempPathFactory) -> Scorer:
    source = ModelSource(str(tiny_folder(tmp_path_factory.mktemp("model"))), "float32")
    return Scorer(load_model(source).eval(), load_tokenizer(source), batch_size=8)


def _mixture(scorer: Scorer, protocol: str = "loglik", **words: Any) -> Mixture:
    given = {"tasks": TASKS, "rows_per_task": 12, "selection_rows": 5, **words}
    return make_mixture(load_suite("commonsense", protocol), scorer, DataConfig(**given))


@pytest.mark.usefixtures("commonsense")
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_the_text_that_is_trained_on_is_the_text_that_is_scored(scorer: Scorer, protocol: str) -> None:
    """The right answer of a row, as training builds it, is among the requests that lm-eval scores for that row."""
    from lm_eval import simple_evaluate

    suite = load_suite("commonsense", protocol)
    with lean_lm_eval():
        found = simple_evaluate(
            model=scorer, tasks=list(suite.tasks.values()), task_manager=suite.manager, limit=3, bootstrap_iters=0
        )
    for name, task in suite.tasks.items():
        for sample in found["samples"][name]:
            prompt, answer = right_request(task, sample["doc"])
            if protocol == "instruct":
                assert sample["arguments"][0][0] == prompt
                assert answer.startswith("the correct answer is ")
            else:
                gold = task.doc_to_text(sample["doc"]) if task.multiple_input else sample["target"]
                assert tuple(sample["arguments"][gold]) == (prompt, answer)


@pytest.mark.usefixtures("commonsense")
def test_tokens_and_labels(scorer: Scorer) -> None:
    mixture = _mixture(scorer)
    tokenizer = scorer.tokenizer
    prompt, answer = mixture.training["boolq"][0]
    assert tokenizer.decode(answer) in (" yes", " no")
    assert tokenizer.decode(prompt).endswith(" heavy?\nAnswer:")
    assert " -- " not in tokenizer.decode(prompt)
    (row,) = as_dataset([(prompt, answer)])
    assert row["input_ids"] == prompt + answer
    assert row["labels"] == [IGNORED] * len(prompt) + answer
    generated = _mixture(scorer, "instruct").training["boolq"][0][1]
    assert generated[-1] == scorer.eot_token_id


@pytest.mark.usefixtures("commonsense")
def test_no_row_is_trained_on_and_chosen_by_or_scored_on(scorer: Scorer) -> None:
    mixture = _mixture(scorer, rows_per_task=100)
    suite = load_suite("commonsense")
    scores, _, _ = score_suite(scorer, suite)
    assert {label: len(task.values) for label, task in scores.items()} == dict.fromkeys(scores, 6)
    for name, rows in mixture.training.items():
        texts = {tuple(prompt + answer) for prompt, answer in rows}
        chosen = {tuple(prompt + answer) for prompt, answer in mixture.selection[name]}
        assert len(chosen) == 5
        # ARC is scored on its test split, so its validation split is free; the others give up training rows
        assert len(texts) == (24 if name == "arc_easy" else 19)
        assert not texts & chosen
        task = suite.tasks[f"moelora_{name}"]
        for document in task.eval_docs:
            request = scorer._encode_pair(*right_request(task, document))
            assert tuple(request[0] + request[1]) not in texts | chosen


@pytest.mark.usefixtures("commonsense")
def test_the_order_is_the_seeds_and_every_row_comes_before_any_comes_twice(scorer: Scorer) -> None:
    mixture = _mixture(scorer)
    config = DataConfig(tasks=TASKS, bucket=3)
    ordered = mixture.ordered(config, steps=12, batch_size=3, seed=0)
    assert len(ordered) == len({tuple(a + b) for a, b in ordered}) == 36
    assert digest(ordered) == digest(mixture.ordered(config, steps=12, batch_size=3, seed=0))
    assert digest(ordered) != digest(mixture.ordered(config, steps=12, batch_size=3, seed=1))
    assert len(mixture.ordered(config, steps=20, batch_size=3, seed=0)) == 60
    unsorted = mixture.ordered(DataConfig(tasks=TASKS, bucket=1), steps=12, batch_size=3, seed=0)
    assert sorted(map(str, unsorted)) == sorted(map(str, ordered))
    assert sum(padded(ordered, 3)) < sum(padded(unsorted, 3))


@pytest.mark.usefixtures("commonsense")
def test_a_long_prompt_loses_its_beginning_and_never_its_answer(scorer: Scorer) -> None:
    short = _mixture(scorer, max_length=20)
    long = _mixture(scorer)
    for name, rows in short.training.items():
        for (prompt, answer), (whole, same) in zip(rows, long.training[name], strict=True):
            assert answer == same
            assert len(prompt) == max(1, min(len(whole), 20 - len(answer)))
            assert prompt == whole[-len(prompt) :]
