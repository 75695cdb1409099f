"""`python -m eval.zoo`: train every preset for a few steps on the real SmolLM2, and time it beside a LoRA.

Each preset is a cell that is done once: run the same command again to go on after it was stopped, or after a preset was
added. A cell whose preset has other defaults now is done anew. It takes one thread and times its CPU seconds, so that
other work beside it disturbs little; to use two cores, run it twice with different --only.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", action="append", metavar="PRESET", help="only this preset; repeatable")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each training (24)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method (5)")
    parser.add_argument("--output", type=Path, default=Path("eval/results/zoo"), help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="say what is left, and do nothing")
    options = parser.parse_args(arguments)
    # after the words are read, so that --help answers at once
    from eval.speed.measure import one_thread, restart_in_huge_pages
    from moelora.runs.program import exit_status
    from moelora.runs.quiet import quiet_libraries

    restart_in_huge_pages("eval.zoo", arguments)
    quiet_libraries()
    with one_thread():
        return exit_status(lambda: run(options), stopped="Stopped. Run the same command again to resume it.")


def run(options: argparse.Namespace) -> None:
    """Do what is left, and write the table after each preset."""
    from eval.receipt import make_receipt
    from eval.zoo.cell import Wishes, measure
    from eval.zoo.report import write_report
    from moelora import presets
    from moelora.files import write_atomically
    from moelora.runs.wording import minutes
    from moelora.validation import check_at_least_one, check_keys

    check_at_least_one(options, "--", "steps", "rounds")
    known = sorted(presets.available())
    check_keys("--only", options.only or [], known)
    wishes = Wishes(options.steps, options.rounds)
    wanted = [preset for preset in known if not options.only or preset in options.only]
    left = [preset for preset in wanted if _finished(options.output, preset, wishes) is None]
    done = [found for preset in known if (found := _finished(options.output, preset, wishes)) is not None]
    print(f"Presets   {len(known)}, of which {len(done)} are done and {len(left)} to do: {', '.join(left) or 'none'}")
    if done and left:
        print(f"Left      about {minutes(len(left) * sum(each['seconds'] for each in done) / len(done))}")
    if options.plan:
        return
    for index, preset in enumerate(left):
        print(f"{index + 1}/{len(left)}  {preset}", flush=True)
        started = time.monotonic()
        found = measure(preset, wishes, lambda line: print(f"      {line}", flush=True))
        seconds = time.monotonic() - started
        words = _identity(preset, wishes)
        receipt = make_receipt(config=words, seeds={"all": 0}, seconds=seconds, command="python -m eval.zoo")
        content = {**found, "wishes": words["wishes"], "identity": words, "receipt": receipt}
        write_atomically(_file(options.output, preset), json.dumps(content, indent=1) + "\n")
        print(f"      {minutes(seconds)}; left about {minutes(seconds * (len(left) - index - 1))}", flush=True)
    cells = [found for preset in known if (found := _finished(options.output, preset, wishes)) is not None]
    if cells:
        missing = [preset for preset in known if preset not in {each["preset"] for each in cells}]
        print("\n" + write_report(options.output, cells, missing))


def _file(output: Path, preset: str) -> Path:
    return output / "cells" / f"{preset}.json"


def _identity(preset: str, wishes: Any) -> dict[str, Any]:
    """What a cell's result depends on, as JSON has it."""
    import dataclasses

    from eval.zoo.bases import base_of
    from eval.zoo.cell import config_of

    base = base_of(preset)
    words = config_of(preset, base).to_dict()
    version = ("moelora_version", "format_version", "peft_version")
    kept = {key: value for key, value in words.items() if key not in version}
    content = {"preset": kept, "base": base.name, "wishes": dataclasses.asdict(wishes)}
    found: dict[str, Any] = json.loads(json.dumps(content, default=str, sort_keys=True))
    return found


def _finished(output: Path, preset: str, wishes: Any) -> dict[str, Any] | None:
    """A finished cell of today's defaults."""
    file = _file(output, preset)
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found.get("identity") == _identity(preset, wishes) else None


if __name__ == "__main__":
    raise SystemExit(main())
