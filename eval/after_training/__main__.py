"""`python -m eval.after_training`: compose, edit and export real adapters, and measure what each of it changes.

Trains the mixture of a run's configuration and a plain LoRA for each of its tasks, unless they are trained already;
then runs each verb on them. A row that misses its limit ends the program with status 1.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(prog="python -m eval.after_training", description=__doc__)
    parser.add_argument(
        "config", nargs="?", default="configs/quickstart-joint.yaml", help="the YAML file of the mixture"
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a value of the file")
    parser.add_argument("--work", type=Path, default=Path("runs/after_training"), help="folder of the adapters")
    parser.add_argument("--output", type=Path, default=Path("eval/results/after_training"), help="folder of the table")
    parser.add_argument("--limit", type=int, default=15, help="fresh problems of each task (default: 15)")
    options = parser.parse_intermixed_args(arguments)
    # after the words are read, so that --help answers at once
    from moelora.runs.program import exit_status
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    return exit_status(lambda: run(options), stopped="Stopped. What is trained stays; run the same command again.")


def run(options: argparse.Namespace) -> None:
    """Train what is missing, run the rows, write the report.

    Raises:
        MoeLoraError: If a row misses its limit, or something cannot be done.
    """
    from eval.after_training.run import run_all

    run_all(options.config, options.overrides, work=options.work, output=options.output, limit=options.limit)


if __name__ == "__main__":
    sys.exit(main())
