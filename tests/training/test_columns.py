"""Columns that a router may read (`task_ids`, `instance_embedding`) reach the model, and never its base."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTConfig

from moelora import MoeLoraSFTTrainer, MoeLoraTrainer, record_routing
from moelora.routing.run import current_place
from tests.adapters import adapted, outputs, tuner_layers
from tests.conftest import tiny_batch
from tests.training.runs import assert_same_step, rows_of, sft_rows, tiny_tokenizer, toy_rows, train

COLUMNS: dict[str, Callable[[int], Tensor]] = {
    "task_ids": lambda count: torch.arange(count) % 3,
    "instance_embedding": lambda count: torch.arange(count * 5, dtype=torch.float32).reshape(count, 5) / 7,
}
COLUMN = pytest.mark.parametrize("column", COLUMNS)


def spied(model: Any) -> tuple[list[dict[str, Any]], list[set[str]]]:
    """The facts that a layer finds in the batch of each forward, and the names of what the base is given."""
    outer: list[dict[str, Any]] = []
    inner: list[set[str]] = []

    def seen(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        inner.append(set(kwargs))

    model.get_base_model().register_forward_pre_hook(seen, with_kwargs=True)

    def note(*_: Any) -> None:
        place = current_place()
        assert place is not None
        outer.append(dict(place.batch.facts))

    next(iter(tuner_layers(model).values())).register_forward_pre_hook(note)
    return outer, inner


def assert_kept(outer: list[dict[str, Any]], inner: list[set[str]], column: str, values: Tensor) -> None:
    assert outer
    assert all(column in kwargs for kwargs in outer)
    found = torch.cat([kwargs[column].reshape(-1, *values.shape[1:]).cpu() for kwargs in outer])
    torch.testing.assert_close(found[-len(values) :].to(values.dtype), values)
    assert inner
    assert not [names for names in inner if names & set(COLUMNS)]


@COLUMN
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_an_argument_of_the_forward(name: str, column: str) -> None:
    """No choice of these presets reads it, so nothing changes."""
    model = adapted("mixlora", name)
    expected = outputs(model, name)
    _, inner = spied(model)
    with record_routing(model) as recorder:
        found = outputs(model, name, **{column: COLUMNS[column](3)})
    assert torch.equal(found, expected)
    assert recorder.records
    assert not inner[0] & set(COLUMNS)


@COLUMN
def test_an_argument_of_generate(column: str) -> None:
    model = adapted("mixlora")
    batch = {key: tiny_batch()[key].flip(1) for key in ("input_ids", "attention_mask")}
    expected = model.generate(**batch, max_new_tokens=4, do_sample=False)
    _, inner = spied(model)
    found = model.generate(**batch, max_new_tokens=4, do_sample=False, **{column: COLUMNS[column](3)})
    assert torch.equal(found, expected)
    assert not [names for names in inner if names & set(COLUMNS)]


@COLUMN
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_trainer_keeps_a_column(name: str, column: str, accumulate: int) -> None:
    def run(with_column: bool) -> Any:
        torch.manual_seed(0)
        model = adapted("mixlora", name, balance_coef=1.0)
        rows = rows_of(tiny_batch(name, batch_size=4)) if name != "llama" else toy_rows(4)
        values = COLUMNS[column](4)
        if with_column:
            rows = [{**row, column: value} for row, value in zip(rows, values, strict=True)]
        spies = spied(model)
        found = train(model, rows, MoeLoraTrainer, batch=4 // accumulate, accumulate=accumulate)
        if with_column:
            assert_kept(*spies, column, values)
        return found

    assert_same_step(run(True), run(False))


@COLUMN
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("padding_free", [False, True])
def test_the_sft_trainer_keeps_a_column(column: str, accumulate: int, padding_free: bool) -> None:
    def run(with_column: bool) -> Any:
        torch.manual_seed(0)
        model = adapted("mixlora", balance_coef=1.0)
        rows, values = sft_rows(4), COLUMNS[column](4)
        if with_column:
            rows = Dataset.from_list([{**row, column: value.tolist()} for row, value in zip(rows, values, strict=True)])
        spies = spied(model)
        found = train(
            model,
            rows,
            MoeLoraSFTTrainer,
            batch=4 // accumulate,
            accumulate=accumulate,
            arguments_class=SFTConfig,
            trainer_words={"processing_class": tiny_tokenizer()},
            padding_free=padding_free,
            max_length=None,
        )
        if with_column:
            assert_kept(*spies, column, values)
        return found

    assert_same_step(run(True), run(False))


def test_evaluation_keeps_a_column() -> None:
    model = adapted("mixlora", balance_coef=1.0)
    values = COLUMNS["task_ids"](4)
    rows = [{**row, "task_ids": value} for row, value in zip(toy_rows(4), values, strict=True)]
    run = train(model, toy_rows(4))
    outer, inner = spied(model)
    metrics = run.trainer.evaluate(rows)
    assert metrics["eval_loss"] > 0
    assert_kept(outer, inner, "task_ids", values)
