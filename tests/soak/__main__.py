"""`python -m tests.soak`: kill training, saving, evaluation and the comparison, and see what the restarted run makes.

Each trial runs a program on a tiny model, kills it with SIGKILL (before one of its changes to a file, or at a random
time, once or twice), runs it again, and compares all that it made with a run that nobody killed, bit for bit.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

# A forked process has none of its parent's threads.
os.environ |= {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "MPLBACKEND": "Agg"}


def main(arguments: list[str] | None = None) -> int:
    """Run the trials; 1 if one of them ends otherwise than a run that nobody killed."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=120, help="how many (120)")
    parser.add_argument("--seed", type=int, default=0, help="of the times and the order (0)")
    parser.add_argument("--only", action="append", metavar="SCENARIO", help="only this one; repeatable")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page that gets the table of kills")
    options = parser.parse_args(arguments)
    import train.sequential
    import train.sft  # noqa: F401  what the programs import is imported before the first fork
    from tests.soak.report import write
    from tests.soak.scenarios import SCENARIOS
    from tests.soak.trial import Outcome, attempt, plans, whole

    unknown = set(options.only or ()) - set(SCENARIOS)
    if unknown:
        parser.error(f"--only is {sorted(unknown)}; allowed: {', '.join(SCENARIOS)}")
    scenarios = [each for name, each in SCENARIOS.items() if not options.only or name in options.only]
    rng = random.Random(options.seed)
    outcomes: list[Outcome] = []
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="soak-") as root:
        wholes = {each.name: whole(each, Path(root) / each.name.replace(" ", "-")) for each in scenarios}
        for each in scenarios:
            ended = wholes[each.name].ended
            print(f"{each.name}: {len(ended.changes)} changes to files in {ended.seconds:.1f} s", flush=True)
        wishes = {each.name: plans(wholes[each.name], rng) for each in scenarios}
        while sum(outcome.killed for outcome in outcomes) < options.kills:
            scenario = scenarios[len(outcomes) % len(scenarios)]
            expected = wholes[scenario.name]
            outcome = attempt(scenario, expected, expected.prepared.parent, next(wishes[scenario.name]))
            outcomes.append(outcome)
            for fault in outcome.faults:
                print(f"{outcome.scenario}, killed {' and '.join(map(str, outcome.kills))}: {fault}", flush=True)
            if len(outcomes) % 10 == 0:
                killed = sum(each.killed for each in outcomes)
                left = (time.monotonic() - started) / max(killed, 1) * (options.kills - killed)
                print(f"{killed} of {options.kills} kills, about {max(left, 0) / 60:.0f} min left", flush=True)
        if options.output:
            write(options.output, outcomes, {name: len(each.ended.changes) for name, each in wholes.items()})
    faulty = Counter(outcome.scenario for outcome in outcomes if outcome.faults)
    killed = sum(outcome.killed for outcome in outcomes)
    print(f"{len(outcomes)} runs, {killed} kills: {sum(faulty.values())} ended otherwise than a run that nobody killed")
    return 1 if faulty else 0


if __name__ == "__main__":
    sys.exit(main())
