"""Score a trained run beside its base model and its baseline.

For example `python -m eval runs/quickstart`, or for an adapter alone
`python -m eval owner/adapter --config configs/quickstart.yaml --limit 20`.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
import time
from collections.abc import Sequence

from train.errors import RunError

SUITES = ("reasoning",)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", help="folder of a run, folder of an adapter, or an adapter's name on the Hub")
    parser.add_argument(
        "--suite", choices=SUITES, default="reasoning", help="what to score it on (default: %(default)s)"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="problems a task (default: the run's evaluation.rows_per_task)"
    )
    parser.add_argument(
        "--config", metavar="YAML", help="the run's configuration, where the source is an adapter alone"
    )
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit is {options.limit}; it must be at least 1")

    from train.quiet import quiet_libraries

    quiet_libraries()
    from moelora.errors import MoeLoraError

    try:
        evaluate(options.source, options.config, options.limit)
    except (RunError, MoeLoraError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nStopped; nothing was written.", file=sys.stderr)
        return 130
    return 0


def evaluate(source: str, config_file: str | None = None, limit: int | None = None) -> None:
    """Run the suite and write metrics.json, report.md and the pictures.

    Args:
        source: As on the command line.
        config_file: As on the command line.
        limit: As on the command line.

    Raises:
        RunError: If there is nothing to evaluate, or no way to.
    """
    from eval import heatmaps, reasoning, report, tables
    from eval.receipt import make_receipt
    from eval.sources import find_contestants
    from train.console import minutes

    started = time.monotonic()
    config, contestants, folder = find_contestants(source, config_file)
    results = reasoning.run(config, contestants, limit)
    folder.mkdir(parents=True, exist_ok=True)
    routing = heatmaps.RoutingMap.of(results.routing) if results.routing else None
    pictures = heatmaps.draw(routing, contestants[-1].name, folder / "heatmaps") if routing else []
    command = " ".join(
        [
            "python -m eval",
            source,
            *([f"--config {config_file}"] if config_file else []),
            *([f"--limit {limit}"] if limit else []),
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
    found = report.metrics(results, contestants, routing, receipt)
    metrics_file = report.write_metrics(found, folder, contestants)
    report_file = report.write_report(results, contestants, routing, pictures, found, folder)

    print("\nExact answers in percent, ± standard error\n")
    print(tables.terminal(*tables.score_rows(results)))
    notes = [note for note in (report.verdict(results), report.at_floor(results)) if note]
    lines = ["", *notes, "", f"report    {report_file}", f"metrics   {metrics_file}"]
    if pictures:
        lines.append(f"pictures  {pictures[0].parent}")
    adapter = contestants[-1].adapter
    lines += [f"adapter   {adapter}", f"\nEvaluated in {minutes(time.monotonic() - started)}. To share the adapter:"]
    print("\n".join([*lines, f"  moelora push {adapter} YOUR_NAME/YOUR_ADAPTER"]), flush=True)


if __name__ == "__main__":
    sys.exit(main())
