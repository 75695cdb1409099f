"""docs/options.md says what runs: its blocks, and the words of its tables."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

from moelora import RouterTraining
from moelora.runs.config import preset_config
from moelora.runs.schema import build

PAGE = (Path(__file__).parents[1] / "docs" / "options.md").read_text()


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
