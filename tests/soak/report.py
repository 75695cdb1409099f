"""The table of kills in tests/RELIABILITY.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tests.reliability import write_section
from tests.soak.trial import Outcome


def write(file: Path, outcomes: Sequence[Outcome], changes: Mapping[str, int]) -> None:
    """Write the table.

    Args:
        file: The page.
        outcomes: What came of the trials.
        changes: How many changes to files a run of each scenario makes.
    """
    names = list(dict.fromkeys(outcome.scenario for outcome in outcomes))
    rows = []
    for name in names:
        own = [outcome for outcome in outcomes if outcome.scenario == name]
        met = {outcome.kills[0].change for outcome in own} - {None}
        equal = sum(not outcome.faults for outcome in own)
        killed = sum(outcome.killed for outcome in own)
        rows.append(f"| {name} | {killed} | {len(met)} of {changes[name]} | {equal} of {len(own)} |")
    write_section(
        file,
        "Killed with SIGKILL",
        "make soak",
        [
            "| program | kills | before changes to files | restarted runs bit-equal |",
            "|---|---|---|---|",
            *rows,
            "",
            *sorted({f"- {outcome.scenario}: {fault}" for outcome in outcomes for fault in outcome.faults}),
        ],
    )
