"""`moelora methods`: the presets, what each is a point of, and what it was checked against."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from moelora.files import write_atomically


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "methods",
        help="list the presets",
        description="Print the table of the presets in Markdown: paper, what is routed, the choices on the axes, "
        "parameters, and what each was checked against.",
    )
    parser.add_argument(
        "--write", metavar="FILE", nargs="+", default=[], help="pages to renew the table in, instead of printing it"
    )
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the table, or renew it in files."""
    from moelora.presets.table import table, with_table

    if not options.write:
        print(table())
    pages = {Path(file): with_table(Path(file).read_text()) for file in options.write}
    for path, page in pages.items():
        write_atomically(path, page)
