"""The recipes on exports run as they stand, on tiny models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from moelora.export import write_mixlora
from moelora_cli import main
from tests import forked
from tests.adapters import shake, small_config
from tests.export.mixtures import composition, fill_centroids, saved
from tests.runs.tiny import tiny_folder

DOCS = Path(__file__).parents[2] / "docs"


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", (DOCS / page).read_text(), flags=re.DOTALL)


def run_commands(page: str) -> None:
    """The commands of a page; `python` in a process of its own."""
    for line in "".join(blocks(page, "bash")).splitlines():
        name, *arguments = shlex.split(line, comments=True)
        if name == "moelora":
            assert main(arguments) == 0, line
        else:
            assert name == "python"
            forked.run(*arguments, folder=Path())


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder has a base model."""
    monkeypatch.chdir(tmp_path)
    return tiny_folder(tmp_path / "my-base")


def test_export_loras(base: Path) -> None:
    words: dict[str, Any] = {"scores": {"kind": "centroids", "features": 36}, "selection": "nearest"}
    mixture = composition(base, **words, placement={"kind": "linear", "routers": "per_model"})
    fill_centroids(mixture, torch.randn(3, 36))
    saved(mixture, Path("my-mixture"))
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), small_config("mixlora"))
    shake(model)
    saved(model, Path("my-adapter"))
    rows = [{"prompt": f"{n} + 1", "completion": str(n + 1)} for n in range(10)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run_commands("export-loras.md")
    for block in blocks("export-loras.md", "python"):
        namespace: dict[str, Any] = {}
        exec(compile(block, "export-loras.md", "exec"), namespace)
        if "request" in namespace:
            assert namespace["request"]["model"] in ("maths", "code", "prose")
    for folder in ("my-loras/maths", "my-loras-again/code", "my-lora", "my-lora-on-data", "my-lora-again"):
        assert Path(folder, "adapter_model.safetensors").is_file(), folder


def test_mixlora_folders(base: Path) -> None:
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), small_config("mixlora"))
    shake(model)
    write_mixlora(model, "alpaca-mixlora")
    run_commands("mixlora-folders.md")
    for block in blocks("mixlora-folders.md", "python"):
        exec(compile(block, "mixlora-folders.md", "exec"), {})
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), "my-adapter-again")
    assert Path("for-mixlora-again/adapter_model.bin").is_file()
