"""`moelora report`: one HTML page about a run, or about several."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moelora_cli.parsing import examples
from moelora_cli.programs import load_program


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        help="write one HTML page about a run, or about several",
        epilog=examples(
            "moelora report runs/quickstart",
            "moelora report runs/quickstart --output page.html",
            "moelora report runs/one runs/other --output comparison.html",
            "moelora report runs/quickstart --json",
        ),
        description="Write one self-contained HTML page about a run: scores, which expert answers which task, what a "
        "sequential run forgets, training curves, heat maps of the routing, and texts coloured by their experts. It "
        "shows what `moelora train`, `moelora eval` and `moelora diagnose` left in the folder. Several runs are put "
        "beside each other.",
    )
    parser.add_argument("run_folders", metavar="RUN", nargs="+", help="folder of a run, or of an adapter")
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--output",
        metavar="FILE",
        help="the HTML file (default: report.html in RUN; of several runs in the working folder)",
    )
    form.add_argument("--json", action="store_true", help="print what the page would show as JSON, and write no page")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the page and print where it is, or print its content."""
    page = load_program("eval.page")
    if options.json:
        print(json.dumps({"runs": page.read_runs(options.run_folders)}, indent=2))
    else:
        print(page.build_report(options.run_folders, options.output))
