"""docs/after-training.md: its commands run, its numbers are the committed ones, and no verb is missing."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from moelora_cli import main
from moelora_cli.export import TARGETS
from tests import forked
from tests.compose.loras import three_loras
from tests.runs.tiny import tiny_folder

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/after-training.md"


def blocks(language: str) -> list[str]:
    found: list[str] = re.findall(rf"```{language}\n(.*?)```", PAGE.read_text(), flags=re.DOTALL)
    return found


def test_its_commands_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    three_loras(tmp_path / "loras")
    tiny_folder(tmp_path / "base")
    rows = {"sums": ["1 + 2", "3 + 40", "What is 7 + 5?"], "words": ["Spell cat.", "Spell a dog.", "Spell house."]}
    rows["facts"] = ["Where is Rome?", "Where is the Nile?"]
    for name, tasks in (("rows", ("sums", "words")), ("unseen", ("sums", "words")), ("facts", ("facts",))):
        lines = [{"prompt": p, "completion": " x", "task": task} for task in tasks for p in rows[task]]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for line in "".join(blocks("bash")).splitlines():
        program, *words = shlex.split(line, comments=True)
        if program == "moelora":
            assert main(words) == 0, line
        else:
            assert forked.run(*words, folder=tmp_path).strip() in ("sums", "words", "facts", "None")
    capfd.readouterr()
    (code,) = blocks("python")
    namespace: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), namespace)
    assert re.search(r"trainable params: [1-9]", capfd.readouterr().out)
    assert sorted(path.name for path in Path("served").iterdir() if path.is_dir()) == ["facts", "sums", "words"]


def test_its_numbers_are_the_committed_ones() -> None:
    scores = json.loads((ROOT / "eval/results/after_training/results.json").read_text())["scores"]
    shown = re.findall(r"^\| (?:composed by )?`?([^|`]+?)`? \| (\d+) % \|$", PAGE.read_text(), flags=re.MULTILINE)
    means = {name: round(100 * sum(tasks.values()) / len(tasks)) for name, tasks in scores.items()}
    assert {name: int(value) for name, value in shown} == means
    assert len(means) == 5
    readme = (ROOT / "README.md").read_text()
    assert "docs/after-training.md" in readme


def test_no_verb_is_missing() -> None:
    text = PAGE.read_text()
    for target in TARGETS:
        assert f"--to {target}" in text
    for verb in ("compose", "add", "drop", "merge", "cut", "freeze", "split", "sequential", "switch_experts"):
        assert re.search(rf"\| .*\b{verb}\b.* \| \[", text), verb
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {PAGE.name}
    linked = set(re.findall(r"\]\(([\w-]+\.md)\)", text))
    assert linked <= pages
    assert {"compose-routers.md", "edit-experts.md", "export-loras.md", "sequential.md"} <= linked
