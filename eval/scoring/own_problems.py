"""Score a run on fresh problems of the reasoning-gym tasks that it was trained on: the quickstart's evaluation."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

from eval.receipt import make_receipt
from eval.scoring import heatmaps, reasoning, reasoning_report, reasoning_tables
from eval.scoring.routing import as_json
from eval.scoring.sources import find_contestants
from moelora.files import write_atomically
from moelora.runs.tables import terminal
from moelora.runs.wording import minutes


def evaluate(
    source: str, config_file: str | None = None, limit: int | None = None, batch_size: int | None = None
) -> dict[str, Any]:
    """Score a run on fresh problems of its tasks and write metrics.json, report.md and the pictures.

    Args:
        source: As on the command line of `moelora eval`.
        config_file: As there.
        limit: As there.
        batch_size: As there.

    Returns:
        What metrics.json has.

    Raises:
        RunError: If there is nothing to evaluate, or no way to.
    """
    started = time.monotonic()
    config, contestants, folder = find_contestants(source, config_file)
    results = reasoning.run(config, contestants, limit, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    routing = heatmaps.RoutingMap.of(results.routing) if results.routing else None
    pictures = heatmaps.draw(routing, contestants[-1].name, folder / "heatmaps") if routing else []
    if routing:
        write_atomically(folder / "routing.json", json.dumps(as_json(routing, results.views)) + "\n")
    command = " ".join(
        [
            "moelora eval",
            source,
            *([f"--config {config_file}"] if config_file else []),
            *([f"--limit {limit}"] if limit else []),
            *([f"--batch-size {batch_size}"] if batch_size else []),
        ]
    )
    receipt = make_receipt(
        config=dataclasses.asdict(config),
        seeds={
            "training": config.training.get("seed", 42),
            "training rows": config.dataset.seed,
            "evaluation problems": config.evaluation.seed,
        },
        seconds=time.monotonic() - started,
        command=command,
    )
    found = reasoning_report.metrics(results, contestants, routing, receipt)
    metrics_file = reasoning_report.write_metrics(found, folder, contestants)
    report_file = reasoning_report.write_report(results, contestants, routing, pictures, found, folder)

    print("\nExact answers in percent, ± standard error\n")
    print(terminal(*reasoning_tables.score_rows(results)))
    notes = [note for note in (reasoning_tables.verdict(results), reasoning_tables.at_floor(results)) if note]
    if results.chosen:
        print("\nWhich expert answers\n")
        print(terminal(*reasoning_tables.chosen_rows(results), foot=0))
    lines = ["", *notes, "", f"report    {report_file}", f"metrics   {metrics_file}"]
    if pictures:
        lines.append(f"pictures  {pictures[0].parent}")
    adapter = contestants[-1].adapter
    lines += [f"adapter   {adapter}", f"\nEvaluated in {minutes(time.monotonic() - started)}. To share the adapter:"]
    lines += [f"  moelora push {adapter} YOUR_NAME/YOUR_ADAPTER", "To look at scores, curves and routing in a browser:"]
    print("\n".join([*lines, f"  moelora report {folder}"]), flush=True)
    return found
