"""`moelora init`: write the YAML file of a run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from moelora_cli.parsing import examples

QUESTIONS = {
    "model": "Base model (a name on the Hub or a folder)",
    "data": "Training rows (files with commas between, or a data set on the Hub)",
    "tasks": "Tasks (`one`; `together` for several at once; or their names in the order in which they come)",
    "memory": "Memory for training in GiB",
}


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "init",
        help="write the YAML file of a run",
        description="Ask for the base model, the rows, the tasks and the memory, and write a YAML file with comments, "
        "which `moelora train` takes. What is given as an option is not asked. Where the input is no terminal, nothing "
        "is asked and what has no default must be given.",
        epilog=examples(
            "moelora init",
            "moelora init --model HuggingFaceTB/SmolLM2-135M-Instruct --data rows.jsonl --tasks one",
            "moelora init --model ./model --data rows.jsonl --tasks sums,words --memory 24 -o in-turn.yaml",
            "moelora init --model Qwen/Qwen2.5-7B --data owner/rows --tasks together --preset smora",
        ),
    )
    parser.add_argument("--model", metavar="NAME", help="the base model: a name on the Hub or a folder")
    parser.add_argument(
        "--data", metavar="ROWS", help="JSON, JSONL, CSV or Parquet files with commas between, or a name on the Hub"
    )
    parser.add_argument(
        "--tasks",
        help="one; together: several that are trained at once; or their names with commas between: one after the "
        "other in that order, where the column `task` of a row says which it is of",
    )
    parser.add_argument(
        "--memory",
        type=float,
        metavar="GIB",
        help="memory for training; the micro-batch and the recomputation of activations are chosen to fit (default: "
        "that of the device)",
    )
    parser.add_argument("--preset", metavar="NAME", help="the method (default: mixlora for tasks together, else lora)")
    parser.add_argument("-o", "--output", metavar="FILE", default="run.yaml", help="the file (default: run.yaml)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the file and say what to do next.

    Raises:
        MoeLoraError: If an answer is missing or does not do, or the file exists.
    """
    from moelora.errors import RunError
    from moelora.runs.quiet import quiet_libraries
    from moelora_cli.run_file import device_memory, write_run_file

    quiet_libraries()
    given = {name: getattr(options, name) for name in QUESTIONS}
    defaults = {"memory": f"{device_memory():.0f}"}
    missing = [name for name, value in given.items() if value is None]
    if sys.stdin.isatty():
        for name in missing:
            default = f" [{defaults[name]}]" if name in defaults else ""
            given[name] = input(f"{QUESTIONS[name]}{default}: ").strip() or defaults.get(name)
    else:
        given |= {name: defaults.get(name) for name in missing}
    missing = [f"--{name}" for name, value in given.items() if not value]
    if missing:
        raise RunError(f"{', '.join(missing)} not given; allowed: as an option, or as an answer in a terminal.")
    try:
        memory = float(given["memory"])
    except ValueError as error:
        raise RunError(f"the memory is {given['memory']!r}; allowed: a number of GiB.") from error
    for line in write_run_file(
        options.output,
        model=given["model"],
        data=given["data"],
        tasks=given["tasks"],
        memory=memory,
        preset=options.preset,
    ):
        print(line)
