"""Whether our task definitions give the numbers of lm-eval's own, to the digit.

`python -m eval.agreement --limit 100` scores a base model on the commonsense suite twice: with the YAML of this
repository, and with the YAML of the installed lm-eval, whose data set alone is swapped for the same rows.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; 1 if anything differs."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.agreement", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m-instruct", help="the base model (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=100, metavar="N", help="rows per task (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at once (default: %(default)s)")
    parser.add_argument("--write", type=Path, metavar="FILE", help="write the numbers with a receipt to this JSON file")
    options = parser.parse_args(arguments)

    from moelora.runs.program import exit_status
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    return exit_status(lambda: run(options), stopped="Stopped; nothing was written.")


def run(options: argparse.Namespace) -> None:
    """Compare, say so, and write it down.

    Raises:
        RunError: If anything differs.
    """
    from eval.receipt import make_receipt
    from eval.scoring.agreement import compare
    from moelora.errors import RunError
    from moelora.files import write_atomically
    from moelora.runs.models import ModelSource, load_model, load_tokenizer
    from moelora.runs.tables import markdown

    started = time.monotonic()
    source = ModelSource(options.model)
    rows = compare(load_model(source).eval(), load_tokenizer(source), options.limit, options.batch_size)

    def said(metrics: dict[str, float]) -> str:
        return ", ".join(f"{key} {value!r}" for key, value in metrics.items())

    lines = [
        [row["official"], str(row["n"]), said(row["ours"]), said(row["theirs"]), "yes" if row["identical"] else "NO"]
        for row in rows
    ]
    print(markdown(["task", "n", "our YAML", "lm-eval's YAML", "identical, each row"], lines))
    if options.write:
        receipt = make_receipt(
            config={"model": options.model, "limit": options.limit, "batch_size": options.batch_size},
            seeds={},
            seconds=time.monotonic() - started,
            command=f"python -m eval.agreement --model {options.model} --limit {options.limit} "
            f"--batch-size {options.batch_size}",
        )
        write_atomically(options.write, json.dumps({"tasks": rows, "receipt": receipt}, indent=1) + "\n")
    different = [row["official"] for row in rows if not row["identical"]]
    if different:
        raise RunError(f"our definitions differ from lm-eval's on {', '.join(different)}.")


if __name__ == "__main__":
    sys.exit(main())
