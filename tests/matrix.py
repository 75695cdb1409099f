"""`python -m tests.matrix NAME`: the tests that depend most on other packages, with the versions of this environment.

`make test-matrix` runs it in an environment of the oldest and in one of the newest versions that pyproject.toml allows.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

from tests.reliability import write_section

TESTS = (
    *("tests/test_families.py", "tests/test_peft_exactness.py", "tests/test_peft_lifecycle.py"),
    *("tests/test_peft_saving.py", "tests/test_peft_several.py", "tests/test_loading.py", "tests/test_quantised.py"),
    *("tests/presets/test_properties.py", "tests/training", "tests/train", "tests/formats"),
)


def summary(junit: Path) -> list[str]:
    """What a run of pytest found, from its JUnit file."""
    suites = ElementTree.parse(junit).getroot().iter("testsuite")
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    seconds, failed = 0.0, list[str]()
    for suite in suites:
        counts = {key: value + int(suite.get(key, 0)) for key, value in counts.items()}
        seconds += float(suite.get("time", 0))
        failed += [
            f"- failed: `{test.get('classname')}.{test.get('name')}`"
            for test in suite.iter("testcase")
            if test.find("failure") is not None or test.find("error") is not None
        ]
    wrong = counts["failures"] + counts["errors"]
    return [
        "| tests | passed | failed | skipped | minutes |",
        "|---|---|---|---|---|",
        f"| {counts['tests']} | {counts['tests'] - wrong - counts['skipped']} | {wrong} | {counts['skipped']} | "
        f"{seconds / 60:.0f} |",
        *([""] if failed else []),
        *failed,
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the tests; pytest's exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.matrix", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", help="what the versions are: oldest, newest")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page that gets a section")
    parser.add_argument("--test", action="append", metavar="PATH", help="this one in place of the list; repeatable")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="matrix-") as folder:
        junit = Path(folder) / "junit.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-n", "2", f"--junitxml={junit}"]
        status = subprocess.run([*command, *(options.test or TESTS)], check=False).returncode
        if options.output is not None and junit.is_file():
            write_section(options.output, f"The {options.name} versions", "make test-matrix", summary(junit))
    return status


if __name__ == "__main__":
    sys.exit(main())
