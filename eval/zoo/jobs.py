"""What `python -m eval.zoo` can measure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from eval.zoo import cell, profile, report, shared_routers
from moelora import presets


@dataclass(frozen=True)
class Job:
    """A cell: the name of its file, the preset, what measures it, and its seed."""

    name: str
    preset: str
    measure: Callable[..., dict[str, Any]]
    seed: int = 0


@dataclass(frozen=True)
class Kind:
    """A kind of cells.

    Args:
        command: The program that makes them.
        folder: Where they are, below the results.
        jobs: Gives all of them in order.
        write: Writes their page.
    """

    command: str
    folder: str
    jobs: Callable[[], list[Job]]
    write: Callable[..., str]


def _tried() -> list[Job]:
    return [Job(preset, preset, partial(cell.measure, preset)) for preset in sorted(presets.available())]


def _profiled() -> list[Job]:
    return [Job(preset, preset, partial(profile.measure_parts, preset)) for preset in sorted(presets.available())]


def _shared() -> list[Job]:
    return [
        Job(f"{preset}-seed{seed}", preset, partial(shared_routers.measure_shared, preset, seed), seed)
        for preset in shared_routers.PRESETS
        for seed in shared_routers.SEEDS
    ]


KINDS = {
    "cells": Kind("python -m eval.zoo", "cells", _tried, report.write_report),
    "profile": Kind("python -m eval.zoo --profile", "profiles", _profiled, profile.write_profile),
    "shared-routers": Kind(
        "python -m eval.zoo --shared-routers", "shared_routers", _shared, shared_routers.write_shared
    ),
}
