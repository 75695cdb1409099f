from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelora.export import write_mixlora
from tests.compose.loras import save_lora
from tests.compose.mixtures import forget_base, saved, saved_by_sequence
from tests.compose.test_split import trained_lora
from tests.export import mixtures
from tests.runs.tiny import tiny_folder


@pytest.fixture(scope="session")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters of each kind, the base model that they fit, and rows."""
    place = tmp_path_factory.mktemp("originals")
    base = tiny_folder(place / "base")
    saved(place / "mixture", "mixlora")
    saved_by_sequence(place / "named")
    trained_lora(place / "lora")
    save_lora(place / "lora-2", 2)
    forget_base(mixtures.saved(mixtures.composition(base), place / "by-task"))
    write_mixlora(place / "mixture", place / "theirs", base=str(base))
    rows = [{"prompt": "1 2 3 ", "completion": "4"}, {"prompt": "5 6 ", "completion": "7 8"}] * 3
    (place / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    tasks = [{**row, "task": "ab"[number // 3]} for number, row in enumerate(rows)]
    (place / "tasks.jsonl").write_text("\n".join(map(json.dumps, tasks)))
    return place
