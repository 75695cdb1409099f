"""The bounds of pyproject.toml are versions that a job installs."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Tools whose newest fitting version is as good as the oldest.
TOOLS = {"ruff", "mypy", "types-pyyaml", "build", "twine", "hatchling", "moelora"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    return {canonical(name): version for name, _, version in (line.partition("==") for line in lines) if version}


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(word for extra in project["optional-dependencies"].values() for word in extra),
    ]
    bounds = {}
    for requirement in wanted:
        found = re.fullmatch(r"([\w-]+)(?:\[.*\])?(?:[>=]=([\d.]+)[\d.,<]*)?\*?", requirement)
        assert found is not None, requirement
        if canonical(found[1]) not in TOOLS:
            bounds[canonical(found[1])] = tuple(map(int, found[2].split(".")))
    oldest = {name: tuple(map(int, version.split("."))) for name, version in pins("constraints-oldest.txt").items()}
    assert oldest.keys() == bounds.keys()
    for name, bound in bounds.items():
        # a bound such as 5.16 is the version 5.16.0
        assert oldest[name] == bound + (0,) * (len(oldest[name]) - len(bound)), name


def test_what_is_tested_is_within_the_bounds() -> None:
    oldest, tested = pins("constraints-oldest.txt"), pins("constraints.txt")
    for name, version in oldest.items():
        low, found = (tuple(map(int, each.split(".")[:3])) for each in (version, tested[name]))
        assert low <= found, name
