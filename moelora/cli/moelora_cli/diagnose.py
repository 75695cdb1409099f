"""`moelora diagnose`: whether a run's tasks need a mixture."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from pathlib import Path
from typing import Any

from moelora_cli.parsing import examples
from moelora_cli.programs import load_program

DESCRIPTION = (
    "Do my tasks need a mixture? Takes the configuration of a training run whose rows say their task, holds out some "
    "of each task's, and trains at equal size, rows and steps: one LoRA for all tasks, a LoRA for each task, and as "
    "many LoRAs on random parts. It compares their losses, the tasks' gradients, and each LoRA on every other task, "
    "and says in a sentence what that speaks for, with the command to go on. The cost is stated before it starts; the "
    "same command resumes it after any stop."
)
EPILOG = examples(
    "moelora diagnose configs/quickstart.yaml --plan",
    "moelora diagnose configs/quickstart.yaml",
    "moelora report runs/diagnose/quickstart",
)


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "diagnose", help="find out whether a run's tasks need a mixture", description=DESCRIPTION, epilog=EPILOG
    )
    add_arguments(parser)
    parser.set_defaults(stopped="Stopped. Run the same command again to resume it.")
    return parser


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the words of the command."""
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of a run, as for `moelora train`")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a value of the file; dots for nesting"
    )
    parser.add_argument("--out", metavar="FOLDER", help="where everything goes (default: runs/diagnose/CONFIG's name)")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[1.0, 2.0],
        metavar="X",
        help="factors of the learning rate; each arm takes its best (default: 1 2)",
    )
    parser.add_argument(
        "--held-out",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="share of each task's prompts that is not trained on: a third of it chooses learning rates, the rest is "
        "scored (default: 0.3)",
    )
    parser.add_argument(
        "--margin",
        type=float,
        default=0.02,
        metavar="NATS",
        help="headroom in nats a token that is worth having (default: 0.02)",
    )
    parser.add_argument("--plan", action="store_true", help="say what it would train and for how long, and do nothing")
    parser.add_argument("--restart", action="store_true", help="throw away what an earlier call has made")
    parser.add_argument("--json", action="store_true", help="print the diagnosis as JSON, everything else on stderr")


def run(options: argparse.Namespace) -> None:
    """Diagnose and print the outcome.

    Raises:
        MoeLoraError: If the configuration, its rows or the folder do not do.
    """
    from moelora.runs.config import load_config
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    words = [options.config, *options.overrides]
    config = load_config(options.config, options.overrides)
    place = load_program("eval.conflict.advice").Place
    choices = load_program("eval.conflict.plan").Options
    with contextlib.redirect_stdout(sys.stderr) if options.json else contextlib.nullcontext():
        found = load_program("eval.conflict.run").diagnose(
            config,
            choices(rates=tuple(options.rates), held_out=options.held_out, margin=options.margin),
            place(tuple(words), Path(options.out or f"runs/diagnose/{Path(options.config).stem}")),
            command=shlex.join(["moelora", "diagnose", *words, *_given(options)]),
            plan_only=options.plan,
            restart=options.restart,
        )
    if found is not None:
        text = load_program("eval.conflict.report").on_terminal(found)
        print(json.dumps(found, indent=1) if options.json else text, flush=True)


def _given(options: argparse.Namespace) -> list[str]:
    """The options that a result depends on, as words."""
    words = ["--out", options.out] if options.out else []
    factors = [f"{factor:g}" for factor in options.rates]
    return [*words, "--rates", *factors, "--held-out", f"{options.held_out:g}", "--margin", f"{options.margin:g}"]
