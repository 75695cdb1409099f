"""docs/options.md says what runs: its blocks, and the words of its tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from moelora import MoeLoraConfig, RouterTraining
from moelora.runs.config import preset_config
from moelora.runs.schema import build

PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text()
ROWS = [tuple(cell.strip() for cell in line.split("|")[1:-1]) for line in PAGE.splitlines() if line.startswith("| ")]
TABLE = [row for row in ROWS if row[1].startswith("`")]


def test_python_blocks() -> None:
    names: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL):
        exec(compile(block, "options.md", "exec"), names)
    assert names["config"].selection.renormalize is False
    assert names["words"] == RouterTraining(learning_rate=1e-3, frozen_steps=20, warmup_steps=50)
    blocks = [yaml.safe_load(block) for block in re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.DOTALL)]
    given, training = blocks
    found = preset_config(given["adapter"])
    assert (found.selection, found.balance) == (names["config"].selection, names["config"].balance)
    assert build(RouterTraining, training["router_training"], "router_training") == names["words"]


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row[0].partition(":")[0])
def test_the_words_of_a_row_change_the_preset(row: tuple[str, ...]) -> None:
    _, preset, words, paper = row
    found = preset_config({"preset": preset.strip("`"), **yaml.safe_load(words.strip("`"))})
    assert found.describe() != MoeLoraConfig.from_preset(preset.strip("`")).describe()
    assert re.search(r"\d{4}\.\d{4,5}", paper)
