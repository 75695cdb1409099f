"""What docs/edit-experts.md and docs/sequential.md say runs as it stands, on tiny models in place of real ones."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml

from moelora_cli import main as moelora
from tests.compose.mixtures import saved, saved_by_sequence
from tests.compose.test_split import trained_lora
from tests.runs.tiny import tiny_folder, write_run
from train.__main__ import main as train

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)
    return found


def test_edit_experts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    saved(tmp_path / "mixture", "mixlora")
    saved_by_sequence(tmp_path / "by-centroid")
    trained_lora(tmp_path / "lora")
    tiny_folder(tmp_path / "base")
    rows = "\n".join(json.dumps({"prompt": f"{n} ", "completion": f"{n + 1}"}) for n in range(4))
    for name in ("rows.jsonl", "legal.jsonl"):
        (tmp_path / name).write_text(rows)
    outputs = []
    for block in blocks("edit-experts.md", "bash"):
        for line in block.splitlines():
            program, *words = shlex.split(line, comments=True)
            assert program == "moelora"
            assert moelora(words) == 0, line
            outputs.append(words[words.index("-o") + 1])
    for block in blocks("edit-experts.md", "python"):
        exec(block, {})
    assert len(outputs) == 9
    for name in (*outputs, "smaller"):
        assert (tmp_path / name / "adapter_config.json").is_file()


def test_sequential(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (words,) = map(yaml.safe_load, blocks("sequential.md", "yaml"))
    write_run(tmp_path, **words)
    monkeypatch.chdir(tmp_path)
    ((command,),) = (block.splitlines() for block in blocks("sequential.md", "bash"))
    assert command.startswith("moelora train ")
    assert train(shlex.split(command)[2:]) == 0
    assert (tmp_path / "run/stages/2-letter_counting/adapter_config.json").is_file()
