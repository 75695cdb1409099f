"""Which expert answers which task."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import fmean
from typing import Any

from eval.page.matrix import Json, matrix


def read_compositions(found: Iterable[tuple[str, Json]], routing: Iterable[Json], words: Json) -> list[Json]:
    """A table of tasks by experts for each evaluation that tells it.

    Where a router decides once for a text, the evaluation has counted the questions of each task that went to each
    expert. Where it decides for each token, the table has the shares of the choices, mean over the layers; experts
    without names are told apart by number and by layer, so that there the heat maps say it and no mean does.

    Args:
        found: Name and content of each metrics.json.
        routing: What the page shows of each routing.json.
        words: The adapter's configuration.
    """
    tables = []
    counted = set()
    for name, content in found:
        chosen: dict[str, dict[str, int]] = content.get("chosen") or {}
        if not chosen:
            continue
        counted.add(name)
        columns = list(next(iter(chosen.values())))
        rows = {task: _cells(counts, columns) for task, counts in chosen.items()}
        tables.append(matrix(f"Questions that went to each expert, {name}.", "Number and share.", columns, rows, 1.0))
    experts = words.get("experts")
    names = experts.get("names") if isinstance(experts, dict) else None
    for each in routing:
        loads = each["load"]
        if (
            not names
            or each["name"] in counted
            or any(len(row) != len(names) for rows in loads.values() for row in rows)
        ):
            continue
        shares = {task: [fmean(column) for column in zip(*rows, strict=True)] for task, rows in loads.items()}
        tables.append(
            matrix(
                f"Share of the choices that fell on each expert, {each['name']}.",
                "Percent, mean over the layers.",
                [str(name) for name in names],
                {task: [(f"{100 * share:.1f}", share) for share in row] for task, row in shares.items()},
                1.0,
            )
        )
    return tables


def _cells(counts: dict[str, Any], columns: list[str]) -> list[tuple[str, float]]:
    total = sum(counts.values())
    shares = [counts.get(name, 0) / total if total else 0.0 for name in columns]
    return [(f"{counts.get(name, 0)} ({share:.0%})", share) for name, share in zip(columns, shares, strict=True)]
