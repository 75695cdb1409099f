"""One trial: a program is killed, resumed, and must end as if nothing had been."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.soak.kills import Ended, Kill, run
from tests.soak.scenarios import Scenario, copied


@dataclass(frozen=True)
class Whole:
    """A run that nobody killed.

    Args:
        prepared: The folder that every trial begins with a copy of.
        digest: What the program made.
        ended: How it ended.
    """

    prepared: Path
    digest: dict[str, str]
    ended: Ended


@dataclass(frozen=True)
class Outcome:
    """What came of a trial.

    Args:
        scenario: Name of the scenario.
        kills: What killed it, one after the other.
        killed: How many of them met it alive.
        faults: What is not as in the run that nobody killed; empty if all is well.
    """

    scenario: str
    kills: tuple[Kill, ...]
    killed: int
    faults: tuple[str, ...]


def whole(scenario: Scenario, folder: Path) -> Whole:
    """Prepare a scenario, and run it without a kill.

    Raises:
        RuntimeError: If it fails.
    """
    prepared = folder / "prepared"
    prepared.mkdir(parents=True)
    first = run(lambda: scenario.prepare(prepared), prepared)
    if first.status != 0:
        raise RuntimeError(f"{scenario.name} cannot be prepared:\n{first.output}")
    place = copied(prepared, folder / "whole")
    ended = run(lambda: scenario.program(place), place)
    digest = scenario.digest(place)
    if ended.status != 0 or not digest:
        raise RuntimeError(f"{scenario.name} fails without a kill:\n{ended.output}")
    return Whole(prepared, digest, ended)


def attempt(scenario: Scenario, expected: Whole, folder: Path, kills: Sequence[Kill]) -> Outcome:
    """Kill a run, once or several times, resume it, and compare."""
    place = copied(expected.prepared, folder / "trial")
    killed = 0
    for kill in kills:
        killed += run(lambda: scenario.program(place), place, kill).status is None
    last = run(lambda: scenario.program(place), place)
    faults = [] if last.status == 0 else [f"the restarted run ends with {last.status}: {_last_line(last.output)}"]
    found = scenario.digest(place)
    for name in sorted(found.keys() | expected.digest.keys()):
        if name not in found:
            faults.append(f"{name} is missing")
        elif name not in expected.digest:
            faults.append(f"{name} is not expected")
        elif found[name] != expected.digest[name]:
            faults.append(f"{name} differs")
    faults += [f"{name} is left over" for name in scenario.leftovers(place)]
    return Outcome(scenario.name, tuple(kills), killed, tuple(faults))


def plans(expected: Whole, rng: random.Random) -> Iterator[tuple[Kill, ...]]:
    """Kills without end: before every change to a file once, in random order, and at random times between."""
    changes = list(range(len(expected.ended.changes)))
    while True:
        rng.shuffle(changes)
        for change in changes:
            yield (Kill(change=change),)
            yield (Kill(seconds=rng.uniform(0, expected.ended.seconds)),)
            yield (Kill(change=rng.choice(changes)), Kill(seconds=rng.uniform(0, expected.ended.seconds)))


def _last_line(output: str) -> str:
    return ([line for line in output.splitlines() if line.strip()] or ["no output"])[-1][:200]
