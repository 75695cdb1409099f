"""Train an adapter from a YAML configuration.

Run the same command again to resume a run that was stopped. In a clone `python -m train` is the same as
`moelora train`.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

STOPPED = "Stopped. Run the same command again to resume from the last checkpoint."
EXAMPLES = """\
Examples:
    moelora train run.yaml
    moelora train configs/quickstart.yaml adapter.r=8 training.max_steps=20 output_dir=runs/short
    moelora train run.yaml --restart
`moelora init` writes such a file."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m train",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)

    # after the words are read, so that --help answers at once
    from moelora.runs.program import exit_status

    return exit_status(lambda: run(options), stopped=STOPPED)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of the program."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a value of the file; dots for nesting"
    )
    parser.add_argument("--recipe", help="the program that trains, as `recipe` in the file: sft, dpo, ...")
    parser.add_argument("--restart", action="store_true", help="throw away what this run has trained so far")


def run(options: argparse.Namespace) -> None:
    """Train as the configuration says.

    Raises:
        MoeLoraError: If the configuration is not valid or the run cannot start or be resumed.
    """
    from moelora.runs.config import load_config
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    recipe = [] if options.recipe is None else [f"recipe={options.recipe}"]
    config = load_config(options.config, [*options.overrides, *recipe])
    # each needs only its own trainer
    importlib.import_module(f".{config.recipe}", __package__).run(config, restart=options.restart)


if __name__ == "__main__":
    sys.exit(main())
