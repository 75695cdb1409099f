"""The table of kills in tests/RELIABILITY.md; the rest of that page is left as it is."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from moelora.files import write_atomically
from tests.soak.trial import Outcome

_BEGIN, _END = "<!-- kills: made by `make soak` -->", "<!-- end of kills -->"


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
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft", "trl"))
    table = "\n".join(
        [
            _BEGIN,
            "",
            f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d}, {versions}, Python {platform.python_version()}.",
            "",
            "| killed with SIGKILL | kills | before changes to files | restarted runs bit-equal |",
            "|---|---|---|---|",
            *rows,
            "",
            *sorted({f"- {outcome.scenario}: {fault}" for outcome in outcomes for fault in outcome.faults}),
            _END,
        ]
    )
    page = file.read_text() if file.exists() else f"# Reliability\n\n{_BEGIN}\n{_END}\n"
    before, _, rest = page.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    write_atomically(file, f"{before}{table}{after}")
