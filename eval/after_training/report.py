"""The table, in Markdown and JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean
from typing import Any

from eval.after_training.bench import Row, Size
from moelora.files import write_atomically
from moelora.runs.tables import markdown
from moelora.runs.wording import commit_words

HEADER = ["verb", "on", "parameters", "MB", "compared", "found", "allowed", "beside it", "seconds"]
NOTES = """\
All models compute in fp32. Sizes are those of the files of weights, before and after; seconds are of the verb alone,
without the measuring. What keeps the function may move logits by what fp32 rounds, {exact:g} of the largest logit. What
does not keep it must leave a lower loss than the base model without an adapter. Problems are fresh: none is a training
row. Routers were fitted on training rows, few of each task. Other programs ran on the machine beside this one: seconds
are upper bounds.
"""


def write_report(
    receipt: Mapping[str, Any], rows: Sequence[Row], scores: Mapping[str, Mapping[str, float]], output: Path
) -> None:
    """Write README.md and results.json.

    Args:
        receipt: Of `make_receipt`.
        rows: The table.
        scores: Exact answers by model and task.
        output: The folder.
    """
    results = {"receipt": receipt, "rows": [{**asdict(row), "passed": row.passed} for row in rows], "scores": scores}
    write_atomically(output / "results.json", json.dumps(results, indent=1) + "\n")
    machine, versions = receipt["machine"], receipt["packages"]
    facts = (
        f"`{receipt['command']}` on {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads, in "
        f"{receipt['wall_seconds'] / 60:.0f} minutes without training; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; commit: {commit_words(receipt['git'])}."
    )
    tasks = list(next(iter(scores.values())))
    answers = [
        [name, *(f"{of_task[task]:.2f}" for task in tasks), f"{mean(of_task.values()):.2f}"]
        for name, of_task in scores.items()
    ]
    text = [
        "# After training: each verb on real adapters\n",
        facts + "\n",
        NOTES.format(exact=receipt["config"]["exact"]),
        markdown(HEADER, [_cells(row) for row in rows], numbers=False) + "\n",
        "## Exact answers\n",
        f"Share of {receipt['config']['limit']} fresh problems a task, by reasoning-gym's verifiers.\n",
        markdown(["model", *tasks, "mean"], answers) + "\n",
    ]
    write_atomically(output / "README.md", "\n".join(text))


def line(row: Row) -> str:
    """A row for a terminal."""
    took = "" if row.seconds is None else f", {row.seconds:.1f} s"
    return f"{row.verb} ({row.on}): {row.compared} {_number(row.value)}, allowed {_allowed(row)}{took}"


def _cells(row: Row) -> list[str]:
    found = _number(row.value) if row.passed else f"**{_number(row.value)}**"
    beside = "; ".join(f"{name} {_number(value)}" for name, value in row.aside.items())
    seconds = "" if row.seconds is None else f"{row.seconds:.1f}"
    return [
        *(row.verb, row.on, _change(row, "parameters"), _change(row, "bytes"), row.compared, found),
        *(_allowed(row) if row.passed else f"{_allowed(row)}: **missed**", beside, seconds),
    ]


def _allowed(row: Row) -> str:
    return f"{'at least' if row.at_least else 'at most'} {_number(row.limit)}"


def _change(row: Row, what: str) -> str:
    def one(size: Size | None) -> str:
        if size is None:
            return ""
        return f"{size.parameters:,}" if what == "parameters" else f"{size.bytes / 1e6:.1f}"

    before, after = one(row.before), one(row.after)
    return f"{before} → {after}" if before and after else before or after


def _number(value: float) -> str:
    """Small ones, which are differences, with a power of ten."""
    if value == 0:
        return "0"
    return f"{value:.1e}" if abs(value) < 1e-2 else f"{value:.3f}"
