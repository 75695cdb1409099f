"""Score a trained run or an adapter beside its base model and its baseline.

On what: the rows that the run kept from training (dataset.held_out), or fresh problems of the reasoning-gym tasks that
it was trained on; with --data rows of files; with --suite the eight commonsense tasks or any task that lm-eval knows.
In a clone `python -m eval` is the same as `moelora eval`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Sequence
from typing import Any

STOPPED = "Stopped; nothing was written."
EXAMPLES = """\
Examples:
    moelora eval runs/quickstart
    moelora eval runs/mine --data unseen.jsonl evaluation.max_new_tokens=64
    moelora eval runs/quickstart --suite commonsense --limit 400
    moelora eval owner/adapter --suite arc_easy,mmlu --beside owner/lora"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval",
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
    parser.add_argument(
        "source", metavar="SOURCE", help="folder of a run, folder of an adapter, or an adapter's name on the Hub"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="change a value of the run's `evaluation`, such as evaluation.max_new_tokens=64; with --data also of its "
        "`dataset`, which says how rows are read",
    )
    parser.add_argument(
        "--suite",
        help="commonsense; reasoning; tasks of lm-eval by name, or YAML files of tasks, separated by commas (default: "
        "rows that the run kept from training, or fresh problems of its reasoning-gym tasks)",
    )
    parser.add_argument(
        "--data",
        metavar="ROWS",
        help="JSON, JSONL, CSV or Parquet files with commas between, whose rows have prompt and completion, or "
        "messages, or the columns that the run names; scored are exact answers and the loss",
    )
    parser.add_argument(
        "--stages", action="store_true", help="of a run of tasks one after the other: score the adapter after each too"
    )
    parser.add_argument(
        "--protocol", help="of the suite commonsense: loglik (default), letters (MixLoRA's), instruct (LLM-Adapters')"
    )
    parser.add_argument(
        "--limit", type=_at_least_one, metavar="N", help="rows per task (default: all, or as the run says)"
    )
    parser.add_argument(
        "--config", metavar="YAML", help="the run's configuration, where the source is an adapter alone"
    )
    parser.add_argument("--model", help="the base model, where the source is an adapter that does not name its own")
    parser.add_argument(
        "--beside",
        action="append",
        default=[],
        metavar="ADAPTER",
        help="another adapter of the same base, or a result that was written before, for the table; repeatable",
    )
    parser.add_argument(
        "--batch-size",
        type=_at_least_one,
        metavar="N",
        help="rows at once (default: 32; of a run's own tasks, as the run says)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print what metrics.json has as JSON, everything else on stderr"
    )


def _at_least_one(word: str) -> int:
    """A count, for argparse."""
    if not word.isdecimal() or int(word) < 1:
        raise argparse.ArgumentTypeError(f"it is {word}; allowed: at least 1")
    return int(word)


def run(options: argparse.Namespace) -> None:
    """Score on a run's own problems or on a suite.

    Raises:
        RunError: If there is nothing to evaluate, or a word does not apply.
    """
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        found = _score(options)
    if options.json:
        print(json.dumps(found, indent=1), flush=True)


def _score(options: argparse.Namespace) -> dict[str, Any]:
    """What metrics.json has."""
    from moelora.errors import RunError
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    own = options.suite == "reasoning" and has_own_problems(options.source, options.config)
    if options.suite and (options.data or options.stages):
        word = "--data" if options.data else "--stages"
        raise RunError(f"{word} and --suite {options.suite!r} are both given; leave one out.")
    if options.suite is None or own:
        if options.stages and (options.data or options.beside):
            raise RunError("--stages scores a run's own tasks; leave --data and --beside out.")
        if options.protocol:
            raise RunError("--protocol does not apply to rows and problems of a run's own tasks; leave it out.")
        data = [part.strip() for part in (options.data or "").split(",") if part.strip()]
        if options.data is not None and not data:
            raise RunError(f"--data is {options.data!r}; allowed: files of rows.")
        from eval.scoring.own_problems import evaluate

        return evaluate(
            options.source,
            options.config,
            options.limit,
            options.batch_size,
            data=data,
            model=options.model,
            others=options.beside,
            overrides=options.overrides,
            stages=options.stages,
        )
    if options.overrides:
        raise RunError(f"{options.overrides[0]!r} does not apply to a suite; leave it out.")
    from eval.scoring.suite_run import card_metrics, run_suite

    scores = run_suite(
        options.source,
        suite=options.suite,
        protocol=options.protocol,
        limit=options.limit,
        config_file=options.config,
        model=options.model,
        beside=options.beside,
        batch_size=options.batch_size or 32,
    )
    return card_metrics(scores)


def has_own_problems(source: str, config_file: str | None) -> bool:
    """Whether a configuration says on which reasoning-gym tasks the source was trained."""
    from moelora.runs.config import load_config
    from moelora.runs.folder import RunDir

    file = RunDir(source).config_file if RunDir(source).config_file.is_file() else config_file
    return file is not None and bool(load_config(file).dataset.tasks)


if __name__ == "__main__":
    sys.exit(main())
