"""The command `moelora`: look at tasks and adapters, compose and edit these, write them in other forms, upload them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from moelora.cli import compose, diagnose, expert, export, inspect, methods, push, report
from moelora.runs.program import exit_status
from moelora.version import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None is that of this process.

    Returns:
        The exit code: 0, or 1 after an error, whose message is on stderr. Wrong usage exits with 2.
    """
    parser = argparse.ArgumentParser(prog="moelora", description="Routed mixtures of LoRA experts as a PEFT method.")
    parser.add_argument("--version", action="version", version=f"moelora {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (inspect, methods, diagnose, compose, expert, export, push, report):
        command.add_parser(commands).set_defaults(run=command.run)
    options = parser.parse_args(arguments)
    return exit_status(lambda: options.run(options), stopped="Stopped.", name=f"moelora {options.command}")
