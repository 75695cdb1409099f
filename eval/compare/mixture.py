"""The training rows: the suite's own prompts with their right answers, in the same order for every method."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.compare.schema import DataConfig
from eval.suites.registry import Suite
from eval.suites.requests import right_request

Tokens = tuple[list[int], list[int]]
"""Tokens of a prompt, and of the answer that follows it."""

IGNORED = -100


@dataclass(frozen=True)
class Mixture:
    """Rows of all tasks as tokens.

    Args:
        training: Task to its rows.
        selection: Task to its rows for choosing the learning rate.
    """

    training: dict[str, list[Tokens]]
    selection: dict[str, list[Tokens]]

    def ordered(self, config: DataConfig, *, steps: int, batch_size: int, seed: int) -> list[Tokens]:
        """`steps * batch_size` rows in the order of training.

        Rows are drawn without replacement until all have been seen. Batches hold rows of like length, or most of a step
        would be padding: the rows of `bucket` batches are sorted, and the batches put into a random order again. The
        order depends on the seed alone, not on the method.

        Args:
            config: Has the size of a bucket.
            steps: Optimizer steps.
            batch_size: Rows per step.
            seed: Seed of the order.
        """
        generator = random.Random(f"order {seed}")
        pool = [row for rows in self.training.values() for row in rows]
        drawn: list[Tokens] = []
        while len(drawn) < steps * batch_size:
            generator.shuffle(pool)
            drawn += pool
        del drawn[steps * batch_size :]
        batches = []
        size = config.bucket * batch_size
        for start in range(0, len(drawn), size):
            bucket = sorted(drawn[start : start + size], key=_length)
            batches += [bucket[at : at + batch_size] for at in range(0, len(bucket), batch_size)]
        generator.shuffle(batches)
        return [row for batch in batches for row in batch]


def _length(row: Tokens) -> int:
    return len(row[0]) + len(row[1])


def make_mixture(suite: Suite, scorer: Any, config: DataConfig) -> Mixture:
    """The rows of a mixture.

    Where a task is scored on its test split, learning rates are chosen on its validation split; where it is scored on
    its validation split, on training rows that are not trained on.

    Args:
        suite: The tasks as they will be scored; prompts and answers are theirs.
        scorer: Its `_encode_pair` splits a row into tokens exactly as scoring does.
        config: How many rows.
    """
    by_folder = {task.config.dataset_kwargs["folder"]: task for task in suite.tasks.values()}
    training, selection = {}, {}
    for name in config.tasks:
        task = by_folder[name]
        documents = list(task.training_docs())
        random.Random(f"rows {config.seed} {name}").shuffle(documents)
        if task.has_test_docs():
            held_out = list(task.validation_docs())
            random.Random(f"rows {config.seed} {name}").shuffle(held_out)
            held_out = held_out[: config.selection_rows]
        else:
            # taken from the end, so that more training rows change nothing else
            held_out = documents[-config.selection_rows :]
            documents = documents[: -config.selection_rows]
        training[name] = _encode(task, documents[: config.rows_per_task], scorer, config.max_length)
        selection[name] = _encode(task, held_out, scorer, config.max_length)
    return Mixture(training, selection)


def _encode(task: Any, documents: Sequence[Any], scorer: Any, max_length: int) -> list[Tokens]:
    rows = []
    for document in documents:
        prompt, answer = right_request(task, document)
        if task.OUTPUT_TYPE == "generate_until":
            # generation starts from the prompt's own tokens, and has to stop
            tokens = scorer.tok_encode(prompt), [*scorer.tok_encode(f"{answer}"), scorer.eot_token_id]
        else:
            tokens = scorer._encode_pair(prompt, answer)
        context, completion = tokens
        rows.append((context[-max(1, max_length - len(completion)) :], completion))
    return rows


def as_dataset(rows: Sequence[Tokens]) -> Any:
    """Rows for TRL, which trains on what has a label: the answers."""
    from datasets import Dataset

    return Dataset.from_list(
        [{"input_ids": [*prompt, *answer], "labels": [IGNORED] * len(prompt) + list(answer)} for prompt, answer in rows]
    )


def digest(rows: Sequence[Tokens]) -> str:
    """SHA-256 of rows in their order."""
    found = hashlib.sha256()
    for prompt, answer in rows:
        found.update(f"{prompt} {answer}\n".encode())
    return found.hexdigest()


def padded(rows: Sequence[Tokens], batch_size: int) -> list[int]:
    """Tokens of each batch, padding included."""
    batches = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
    return [len(batch) * max(map(_length, batch)) for batch in batches]
