"""All rows, one after the other, and the report."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from eval.after_training import compositions, edits, exports
from eval.after_training.adapters import LORA, LORA_TRAINING, train_adapters
from eval.after_training.bench import EXACT, Bench, Row
from eval.after_training.report import line, write_report
from eval.receipt import make_receipt
from moelora.errors import RunError
from moelora.runs.config import load_config

VERBS: tuple[Callable[[Bench], Iterator[Row]], ...] = (
    compositions.uniform,
    compositions.task,
    compositions.centroids,
    compositions.arrow,
    compositions.others,
    edits.unchanged,
    edits.approximate,
    edits.by_centroid,
    edits.split,
    exports.native_moe,
    exports.loras,
    exports.one_lora,
    exports.mixlora,
)


def run_all(config: str | Path, overrides: Sequence[str], *, work: Path, output: Path, limit: int) -> list[Row]:
    """Train the adapters that are missing, run each verb on them, and write README.md and results.json.

    Args:
        config: The YAML file of the mixture's run.
        overrides: Changes to it.
        work: Folder of the adapters.
        output: Folder of the report.
        limit: Fresh problems of each task.

    Raises:
        RunError: If a row misses its limit; the report is written and says which.
    """
    read = load_config(config, overrides)
    mixture, loras = train_adapters(read, work)
    started = time.time()
    rows = []
    with tempfile.TemporaryDirectory(prefix="verbs-", dir=work) as made:
        bench = Bench.open(read, Path(made), mixture, loras, limit)
        bench.scores = compositions.scores(bench)
        for verb in VERBS:
            for row in verb(bench):
                rows.append(row)
                print(line(row), flush=True)
    receipt = make_receipt(
        config={
            "run": str(config),
            "overrides": list(overrides),
            "loras": LORA | LORA_TRAINING,
            "exact": EXACT,
            "limit": limit,
        },
        seeds={"training": read.training.get("seed", 0), "problems": read.evaluation.seed},
        seconds=time.time() - started,
        command=" ".join(["python -m eval.after_training", *([str(config)] if overrides else []), *overrides]),
    )
    write_report(receipt, rows, bench.scores, output)
    if missed := [row for row in rows if not row.passed]:
        raise RunError("rows that miss their limits: " + "; ".join(map(line, missed)))
    return rows
