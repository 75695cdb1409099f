"""Train and score several methods alike, and render the table.

It says first what it will do and how long that takes. Run the same command again to resume it after it was stopped,
however it was stopped; what is finished is never done again. Run it twice at once, with a thread each, and the two
share the work. --plan only says, --render only draws the tables of what is there. In a clone `python -m eval.compare`
is the same as `moelora compare`.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import sys
import time
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

# Seconds between two looks at what another process is doing.
_PAUSE = 5.0
STOPPED = "Stopped. Run the same command again to resume it."
EXAMPLES = """\
Examples:
    moelora compare configs/benchmarks/commonsense.yaml --plan
    moelora compare configs/benchmarks/commonsense.yaml
    moelora compare configs/benchmarks/commonsense.yaml --only lora --only '*-lr'"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
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
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of the comparison")
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
    parser.add_argument(
        "--json", action="store_true", help="print the summary as JSON in the end, everything else on stderr"
    )
    parser.add_argument("--no-probe", action="store_true", help="do not time a few steps for the estimate")


def run(options: argparse.Namespace) -> None:
    """Do what is left of a comparison.

    Raises:
        MoeLoraError: If the configuration is not valid, its methods are not of equal size, results of another
            configuration are in the way, or there is nothing to draw yet.
    """
    from moelora.errors import RunError

    if options.json and options.plan:
        raise RunError("--json prints what was scored, and --plan scores nothing; leave one of them out.")
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        table = _run(options)
    if options.json:
        if table is None:
            raise RunError("nothing is scored yet, so there is no summary to print.")
        print((table.parent / "summary.json").read_text(), end="", flush=True)


def _run(options: argparse.Namespace) -> Path | None:
    """The table of what is scored; None if nothing is, or for a plan."""
    from eval import figures
    from eval.compare import plan
    from eval.compare.cells import Board
    from eval.compare.render import render
    from eval.compare.schema import load_benchmark
    from eval.compare.sizes import check_sizes
    from eval.compare.work import open_bench
    from moelora.errors import RunError
    from moelora.runs.console import say
    from moelora.runs.precision import say_if_slow
    from moelora.runs.quiet import quiet_libraries
    from moelora.runs.wording import minutes

    quiet_libraries()
    command = shlex.join(["moelora", "compare", options.config, *options.overrides])
    config = load_benchmark(options.config, options.overrides)
    board = Board(config)
    if not options.plan and not figures.are_possible():
        raise RunError("a comparison draws with matplotlib, which is not installed: pip install matplotlib.")
    if options.render:
        table = render(board, command)
        if table is None:
            raise RunError(f"nothing is scored yet in {config.results_dir!r}, so there is no table to draw.")
        say(f"Table     {table}")
        return table
    sizes = check_sizes(config)
    for key, size in sizes.items():
        say(f"Method    {key}: {size.trainable:,} trainable parameters, {size.active:,} active per token")
    say_if_slow(config.dtype)
    if options.plan:
        plan.show(board)
        return None
    bench = open_bench(board, sizes, command)
    if not options.no_probe:
        plan.probe(bench)
    plan.show(board)
    started = time.monotonic()
    wanted = options.only or ["*"]
    done: set[str] = set()
    waited = False
    while True:
        left = [
            cell
            for cell in board.cells()
            if any(fnmatchcase(cell.id, f"{name}*") for name in wanted) and not board.is_finished(cell)
        ]
        lost = {cell.method: why for cell in left if cell.kind == "final" and (why := board.lost(cell.method))}
        left = [cell for cell in left if cell.method not in lost]
        if done and left and not waited:
            time_left = plan.remaining(board, plan.Timing.of(board), left)
            say(f"Left      {len(left)} cell{'s' if len(left) > 1 else ''}, {time_left}")
        waits = {cell: board.waits_for(cell) for cell in left}
        ready = [cell for cell in left if not waits[cell]]
        # one at a time: what is finished meanwhile may let others begin, and choose their learning rates
        if any(cell.id not in done and _do(bench, cell, done) for cell in ready):
            waited = False
            continue
        # cells that another process is at may let more begin
        blocking = {each for needed in waits.values() for each in needed}
        busy = sorted(each.id for each in blocking if board.is_claimed(each))
        if not busy and any(board.is_finished(each) for each in blocking):
            continue  # since `left` was made
        if not busy:
            break
        if not waited:
            say(f"Waiting   for {', '.join(busy)}, which another process is at")
        waited = True
        time.sleep(_PAUSE)
    if left and not ready:
        waiting = "; ".join(f"{cell.id} waits for {waits[cell][0].id}" for cell in left)
        raise RunError(f"{waiting}. Leave --only out, or add them to it.")
    others = f", {', '.join(cell.id for cell in ready)} still under way in another process" if ready else ""
    table = render(board, command)
    say(f"\nDone in {minutes(time.monotonic() - started)}{others}: {table or 'nothing is scored yet'}")
    if lost:
        rates = ", ".join(f"{rate:g}" for rate in config.selection.learning_rates)
        raise RunError(
            f"{', '.join(lost)} cannot be trained at any of selection.learning_rates {rates}: "
            f"{next(iter(lost.values()))} Give lower ones, or a learning_rate of its own, or take it out."
        )
    return table


def _do(bench: Any, cell: Any, done: set[str]) -> bool:
    """Do one cell and note it, unless another process is at it or has just finished it; whether it was done."""
    from eval.compare import plan
    from eval.compare.render import render
    from moelora.runs.console import say
    from moelora.runs.wording import minutes

    board = bench.board
    with board.claimed(cell) as ours:
        if not ours or board.is_finished(cell):
            return False
        estimate = plan.Timing.of(board).estimate(board, cell)
        say(f"\nCell      {cell.id}" + (f", about {minutes(estimate)}" if estimate else ""))
        began = time.monotonic()
        bench.do(cell)
        done.add(cell.id)
        say(f"Finished  {cell.id} in {minutes(time.monotonic() - began)}")
        # still claimed, so that who waits for this process sees that it goes on
        render(board, bench.command)
    return True


if __name__ == "__main__":
    sys.exit(main())
