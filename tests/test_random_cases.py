"""A few of the random cases of `tests/random_cases.py`; MOELORA_RANDOM_CASES=10000 runs as many as are asked for."""

from __future__ import annotations

import os
from pathlib import Path

from tests.random_cases import Cases


def test_bad_input_is_refused_in_one_line_and_leaves_everything_as_it_was(tmp_path: Path) -> None:
    number = int(os.environ.get("MOELORA_RANDOM_CASES", "150"))
    cases = Cases(int(os.environ.get("MOELORA_RANDOM_SEED", "0")), tmp_path)
    found = cases.run(number)
    assert sum(found.values()) == number
    assert {kind.partition(":")[0] for kind in found} == {case.__name__ for _, case in cases.kinds}
    assert {kind.partition(": ")[2] for kind in found} == {"worked", "refused"}
