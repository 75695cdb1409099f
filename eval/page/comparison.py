"""Several runs on one page: their facts, scores and curves beside each other."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Json = dict[str, Any]


def compare_runs(runs: Mapping[str, Json]) -> Json:
    """What the page of several runs shows, in the form of one run's.

    Args:
        runs: Name of a run to what `read_run` found of it.
    """
    facts = list(dict.fromkeys(name for content in runs.values() for name, _ in content["facts"]))
    return {
        "title": f"{len(runs)} runs compared",
        "facts": [],
        "runs": {
            "columns": ["adapter", *facts],
            "rows": [
                [name, content["title"], *(dict(content["facts"]).get(fact, "") for fact in facts)]
                for name, content in runs.items()
            ],
        },
        "diagnosis": None,
        "evaluations": _evaluations(runs),
        "compositions": [
            {**table, "title": f"{name}: {table['title']}"}
            for name, content in runs.items()
            for table in content["compositions"]
        ],
        "forgetting": [
            {
                **each,
                "matrix": {**each["matrix"], "title": f"{name}: {each['matrix']['title']}"},
                "curve": {**each["curve"], "title": f"{name}: {each['curve']['title']}"},
            }
            for name, content in runs.items()
            for each in content["forgetting"]
        ],
        "curves": _curves(runs),
        "routing": [
            {**routing, "name": f"{name}: {routing['name']}"}
            for name, content in runs.items()
            for routing in content["routing"]
        ],
        "receipt": {},
        "missing": [f"{name}: {text}" for name, content in runs.items() for text in _missing(content)],
    }


def _missing(content: Json) -> list[str]:
    diagnosed = ["its diagnosis is on its own page: `moelora report RUN`."] if content["diagnosis"] else []
    return [*content["missing"], *diagnosed]


def _evaluations(runs: Mapping[str, Json]) -> list[Json]:
    """One table for each suite and protocol.

    Rows are shared only by what is the same: the task, the metric, the number of problems and the majority floor. A
    mean is shared only where all of its tasks are. A model that scores the same everywhere under the same name, as the
    base model does, has one column.
    """
    merged: dict[tuple[str, str | None], list[tuple[str, Json]]] = {}
    for name, content in runs.items():
        for evaluation in content["evaluations"]:
            if not evaluation["rows"]:
                continue  # losses of texts alone, and each run held out texts of its own
            merged.setdefault((evaluation["name"], evaluation["protocol"]), []).append((name, evaluation))
    return [_merge(name, protocol, parts) for (name, protocol), parts in merged.items()]


def _merge(name: str, protocol: str | None, parts: list[tuple[str, Json]]) -> Json:
    rows: dict[Any, Json] = {}
    columns: dict[str, dict[Any, Json]] = {}
    for run, evaluation in parts:
        keyed = _keyed(evaluation)
        for key, row in keyed.items():
            rows.setdefault(key, {**row, "cells": {}})
        for model in evaluation["models"]:
            cells = {key: row["cells"][model] for key, row in keyed.items() if model in row["cells"]}
            if columns.get(model) == cells:
                continue
            columns[f"{run}: {model}" if model != "base" or model in columns else model] = cells
    for column, cells in columns.items():
        for key, cell in cells.items():
            rows[key]["cells"][column] = cell
    ordered = sorted(rows.values(), key=_is_mean)
    return {
        "name": name,
        "protocol": protocol,
        "models": list(columns),
        "rows": ordered,
        # each run held out rows of its own
        "losses": {},
        "any_floor": any(evaluation["any_floor"] for _, evaluation in parts),
    }


def _keyed(evaluation: Json) -> dict[Any, Json]:
    """The rows by what makes them comparable."""
    everything = frozenset(_key(row) for row in evaluation["rows"] if not _is_mean(row))
    return {(row["task"], row["metric"], everything) if _is_mean(row) else _key(row): row for row in evaluation["rows"]}


def _key(row: Json) -> tuple[Any, ...]:
    return row["task"], row["metric"], row["n"], row["floor"]


def _is_mean(row: Json) -> bool:
    """Whether a row is a mean of tasks."""
    found: bool = row["task"].startswith("mean of tasks")
    return found


def _curves(runs: Mapping[str, Json]) -> list[Json]:
    """The same value of all runs in one picture."""
    curves: dict[str, Json] = {}
    for name, content in runs.items():
        for curve in content["curves"]:
            shown = curves.setdefault(curve["title"], {**curve, "series": []})
            shown["series"] += [
                {**series, "name": name if series["name"] == "adapter" else f"{name}, {series['name']}"}
                for series in curve["series"]
            ]
    return list(curves.values())
