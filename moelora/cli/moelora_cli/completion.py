"""`moelora completion`: what a shell needs to complete the words of the command."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moelora_cli.parsing import examples

SHELLS = ("bash", "zsh", "fish", "tcsh")


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "completion",
        help="print a shell's completion of this command",
        description="Print the script with which a shell completes verbs and options. It is made by shtab.",
        epilog=examples(
            "moelora completion bash > ~/.local/share/bash-completion/completions/moelora",
            "moelora completion zsh > ~/.zfunc/_moelora",
        ),
    )
    parser.add_argument("shell", choices=SHELLS, metavar="SHELL", help=", ".join(SHELLS))
    parser.set_defaults(needs_library=False)
    return parser


def run(options: argparse.Namespace) -> int:
    """Print the script; the exit status."""
    try:
        import shtab
    except ImportError:
        print("moelora completion: shtab is not installed: pip install shtab", file=sys.stderr)
        return 1
    from moelora_cli import make_parser

    print(shtab.complete(make_parser(), shell=options.shell))
    return 0
