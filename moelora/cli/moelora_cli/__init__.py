"""The command `moelora`: train, evaluate, look at, compose, edit, export and upload adapters.

It is a package of its own, which a wheel has beside the library, because importing anything of `moelora` imports torch,
transformers and PEFT: that takes seconds, and fails where one of them is broken, which is what `moelora doctor` is for.
Modules here import the library only in the functions that do the work.
"""

from __future__ import annotations

import argparse
import os
import runpy
import signal
import sys
from collections.abc import Sequence
from typing import Any

from moelora_cli import (
    chat,
    completion,
    compose,
    diagnose,
    doctor,
    expert,
    export,
    init,
    inspect,
    params,
    presets,
    push,
    report,
)
from moelora_cli.parsing import VerbParser
from moelora_cli.programs import add_program, library_folder

EXIT_STATUS = "Exit status: 0 done; 1 an error, in one line on standard error; 2 wrong words; 130 interrupted."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: What follows the command's name; None is that of this process.

    Returns:
        The exit status: 0, or 1 after an error, whose message is on stderr. Wrong words exit with 2.
    """
    options = make_parser().parse_args(arguments)
    try:
        status = _with_library(options) if options.needs_library else int(options.run(options))
        sys.stdout.flush()
    except BrokenPipeError:
        # whoever read the output, such as `head`, has gone; nor is there anyone for what the buffer still holds
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def make_parser() -> argparse.ArgumentParser:
    """The parser of all verbs; makes nothing but parsers and imports nothing heavy."""
    parser = VerbParser(
        prog="moelora",
        description="Routed mixtures of LoRA experts as a PEFT method.",
        epilog=f"`moelora COMMAND --help` has examples. {EXIT_STATUS}",
    )
    parser.add_argument("--version", action="version", version=f"moelora {version()}")
    parser.set_defaults(needs_library=True, stopped="Stopped.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    init.add_parser(commands).set_defaults(run=init.run)
    for program in ("train", "eval", "compare"):
        add_program(commands, program)
    for verb in (chat, params, diagnose, inspect, report, compose, expert, export, push, presets, doctor, completion):
        verb.add_parser(commands).set_defaults(run=verb.run)
    return parser


def version() -> str:
    """The version of the library, which is not imported for it."""
    return str(runpy.run_path(str(library_folder() / "version.py"))["__version__"])


def _with_library(options: Any) -> int:
    try:
        from moelora.runs.program import exit_status
    except ImportError as error:
        name = f"moelora {options.command}"
        print(f"{name}: the library cannot be imported: {error}. `moelora doctor` says more.", file=sys.stderr)
        return 1
    return exit_status(lambda: options.run(options), stopped=options.stopped, name=f"moelora {options.command}")
