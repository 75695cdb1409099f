"""`python -m eval.zoo`: train every preset for a few steps on the real SmolLM2, and time it beside a LoRA.

With --profile: where the time of each preset's step goes, beside a LoRA of equal rank. With --shared-routers: presets
with one router for linears of the same input, beside a router for each.

Each preset is a cell that is done once: run the same command again to go on after it was stopped, or after a preset was
added. A cell whose preset has other defaults now is done anew. It takes one thread and times its CPU seconds (a profile
times by the clock), so that other work beside it disturbs little; to use two cores, run it twice with different --only.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Command line; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.zoo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_mutually_exclusive_group()
    for name, words in (
        ("profile", "where the time of a step goes"),
        ("shared-routers", "one router for linears of the same input"),
    ):
        kinds.add_argument(f"--{name}", action="store_const", dest="kind", const=name, help=words)
    parser.add_argument("--only", action="append", metavar="PRESET", help="only this preset; repeatable")
    parser.add_argument("--steps", type=int, default=24, help="optimizer steps of each training (24)")
    parser.add_argument("--rounds", type=int, default=5, help="timed steps of each method (5)")
    parser.add_argument("--output", type=Path, default=Path("eval/results/zoo"), help="folder of the results")
    parser.add_argument("--plan", action="store_true", help="say what is left, and do nothing")
    parser.set_defaults(kind="cells")
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
    """Do what is left, and write the page."""
    from eval.receipt import make_receipt
    from eval.zoo.cell import Wishes
    from eval.zoo.jobs import KINDS
    from moelora.errors import RunError
    from moelora.files import write_atomically
    from moelora.runs.wording import minutes
    from moelora.validation import check_at_least_one, check_keys

    check_at_least_one(options, "--", "steps", "rounds")
    kind = KINDS[options.kind]
    jobs = kind.jobs()
    check_keys("--only", options.only or [], sorted({job.preset for job in jobs}))
    wishes = Wishes(options.steps, options.rounds)
    folder = options.output / kind.folder
    left = [
        job
        for job in jobs
        if (not options.only or job.preset in options.only) and _finished(folder, job, wishes) is None
    ]
    done = [found for job in jobs if (found := _finished(folder, job, wishes)) is not None]
    names = ", ".join(job.name for job in left)
    print(f"Cells     {len(jobs)}, of which {len(done)} are done and {len(left)} to do: {names or 'none'}")
    if done and left:
        mean = sum(each["receipt"]["wall_seconds"] for each in done) / len(done)
        print(f"Left      about {minutes(len(left) * mean)}")
    if options.plan:
        return
    failed: dict[str, str] = {}
    for index, job in enumerate(left):
        print(f"{index + 1}/{len(left)}  {job.name}", flush=True)
        started = time.monotonic()
        try:
            found = job.measure(wishes, lambda line: print(f"      {line}", flush=True))
        except Exception as error:  # hours of other cells should not wait for this one
            traceback.print_exc()
            failed[job.name] = type(error).__name__  # not the error: it would keep the models of its cell alive
            continue
        seconds = time.monotonic() - started
        words = _identity(job.preset, wishes)
        receipt = make_receipt(config=words, seeds={"all": job.seed}, seconds=seconds, command=kind.command)
        content = {**found, "wishes": words["wishes"], "identity": words, "receipt": receipt}
        write_atomically(folder / f"{job.name}.json", json.dumps(content, indent=1) + "\n")
        print(f"      {minutes(seconds)}; left about {minutes(seconds * (len(left) - index - 1))}", flush=True)
    found_of = {job.name: _finished(folder, job, wishes) for job in jobs}
    cells = [found for found in found_of.values() if found is not None]
    if cells:
        missing = [name for name, found in found_of.items() if found is None]
        print("\n" + kind.write(options.output, cells, missing))
    if failed:
        names = ", ".join(f"{name} ({kind_of_error}, above)" for name, kind_of_error in failed.items())
        raise RunError(f"{len(failed)} of {len(left)} cells failed: {names}. Run the same command again to retry.")


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


def _finished(folder: Path, job: Any, wishes: Any) -> dict[str, Any] | None:
    """A finished cell of today's defaults."""
    file = folder / f"{job.name}.json"
    if not file.is_file():
        return None
    found: dict[str, Any] = json.loads(file.read_text())
    return found if found.get("identity") == _identity(job.preset, wishes) else None


if __name__ == "__main__":
    raise SystemExit(main())
