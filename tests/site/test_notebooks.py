"""The notebooks run in their order on tiny things, and hold no outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.site.pages import DOCS, tiny_world

NOTEBOOKS = sorted((DOCS / "notebooks").glob("*.ipynb"))


def _cells(notebook: Path) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = json.loads(notebook.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.notebooks
def test_they_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    tiny_world(tmp_path)
    names: dict[str, dict[str, Any]] = {}
    for notebook in NOTEBOOKS:
        names[notebook.stem] = {}
        for cell in _cells(notebook):
            code = "".join(cell["source"])
            tiny = {
                '"HuggingFaceTB/SmolLM2-135M-Instruct"': '"tiny"',
                "max_steps=60": "max_steps=2",
                "logging_steps=10": "logging_steps=1",
            }
            for original, replacement in tiny.items():
                code = code.replace(original, replacement)
            exec(compile(code, notebook.name, "exec"), names[notebook.stem])
    train, compose, export = names.values()
    assert "balance_loss" in train["trainer"].state.log_history[0]
    assert compose["answering"]("What is 5 + 6?") in ("sums", "spelling", "base model")
    assert (compose["edit"].before.num_experts, compose["edit"].after.num_experts) == (2, 3)
    assert 0 < export["found"].kept <= 1
    assert (tmp_path / "my-moe" / "config.json").is_file()


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda notebook: notebook.stem)
def test_outputs_are_stripped(notebook: Path) -> None:
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in _cells(notebook))
