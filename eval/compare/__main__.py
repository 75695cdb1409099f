"""Train and score several methods alike, and render the table.

For example `python -m eval.compare configs/benchmarks/commonsense.yaml`. It says first what it will do and how long
that takes. Run the same command again to resume it after it was stopped, however it was stopped; what is finished is
never done again. `--plan` only says, `--render` only draws the tables of what is there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="the YAML file of the comparison")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a value of the file; dots for nesting"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--plan", action="store_true", help="say what would be done, and do nothing")
    what.add_argument("--render", action="store_true", help="draw tables and pictures of what is finished")
    parser.add_argument(
        "--only",
        metavar="CELL",
        action="append",
        help="do only cells whose names begin so, '*' for anything: lora, '*-lr' for all trials; repeatable",
    )
    parser.add_argument("--no-probe", action="store_true", help="do not time a few steps for the estimate")
    options = parser.parse_intermixed_args(arguments)

    # after the words are read, so that --help answers at once
    from moelora.runs.program import exit_status
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    command = f"python -m eval.compare {' '.join([options.config, *options.overrides])}"
    return exit_status(lambda: run(options, command), stopped="Stopped. Run the same command again to resume it.")


def run(options: argparse.Namespace, command: str) -> None:
    """Do what is left of a comparison.

    Raises:
        MoeLoraError: If the configuration is not valid, its methods are not of equal size, results of another
            configuration are in the way, or there is nothing to draw yet.
    """
    from eval.compare import plan
    from eval.compare.cells import Board
    from eval.compare.render import render
    from eval.compare.schema import load_benchmark
    from eval.compare.sizes import check_sizes
    from eval.compare.work import Bench
    from moelora.errors import RunError
    from moelora.runs.console import say
    from moelora.runs.wording import minutes

    config = load_benchmark(options.config, options.overrides)
    board = Board(config)
    if options.render:
        table = render(board, command)
        if table is None:
            raise RunError(f"nothing is scored yet in {config.results_dir!r}, so there is no table to draw.")
        say(f"Table     {table}")
        return
    sizes = check_sizes(config)
    for key, size in sizes.items():
        say(f"Method    {key}: {size.trainable:,} trainable parameters, {size.active:,} active per token")
    if options.plan:
        plan.show(board, plan.Timing.of(board))
        return
    with board.locked():
        bench = Bench.open(board, sizes, command)
        if not options.no_probe:
            plan.probe(bench)
        plan.show(board, plan.Timing.of(board))
        started = time.monotonic()
        for cell in board.cells():
            if options.only and not any(fnmatchcase(cell.id, f"{wanted}*") for wanted in options.only):
                continue
            # learning rates are chosen on the way
            cell = next(each for each in board.cells() if each.id == cell.id)
            if board.is_finished(cell):
                continue
            if cell.kind == "final" and cell.learning_rate is None:
                raise RunError(f"{cell.id} waits for the trials of {cell.method}; leave --only out, or add them to it.")
            estimate = plan.Timing.of(board).estimate(board, cell)
            say(f"\nCell      {cell.id}" + (f", about {minutes(estimate)}" if estimate else ""))
            began = time.monotonic()
            bench.do(cell)
            say(f"Finished  {cell.id} in {minutes(time.monotonic() - began)}")
            render(board, command)
        say(f"\nDone in {minutes(time.monotonic() - started)}: {render(board, command) or 'nothing is scored yet'}")


if __name__ == "__main__":
    sys.exit(main())
