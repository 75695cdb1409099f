"""`moelora report`: one HTML page about a run."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples
from moelora_cli.programs import load_program


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="write one HTML page about a run",
        epilog=examples("moelora report runs/quickstart", "moelora report runs/quickstart --output page.html"),
        description="Write one self-contained HTML page about a run: scores, training curves, heat maps of the "
        "routing, and texts coloured by their experts. It shows what `moelora train` and `moelora eval` left in "
        "the folder.",
    )
    parser.add_argument("run_folder", metavar="RUN", help="folder of a run, or of an adapter")
    parser.add_argument("--output", metavar="FILE", help="the HTML file (default: report.html in RUN)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the page and print where it is."""
    print(load_program("eval.page").build_report(options.run_folder, options.output))
