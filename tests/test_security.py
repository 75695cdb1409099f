"""No code comes with data: no pickle is trusted, no repository's code is run, no name leads out of a folder."""

from __future__ import annotations

import ast
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from moelora.errors import MoeLoraError
from moelora.validation import unusable_name
from tests.adapters import adapted
from tests.conftest import tiny_model
from tests.runs.tiny import write_run
from train.__main__ import main

ROOT = Path(__file__).parent.parent
FILES = sorted(path for place in ("moelora", "train", "eval") for path in (ROOT / place).rglob("*.py"))


@functools.cache
def calls() -> list[tuple[str, str, ast.Call]]:
    """All calls in the code: the file, the function's name, the call."""
    return [
        (str(path.relative_to(ROOT)), ast.unparse(node.func), node)
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call)
    ]


def test_pickles_are_read_as_tensors_alone() -> None:
    loads = [(file, call) for file, name, call in calls() if name.endswith("torch.load")]
    assert loads
    for file, call in loads:
        assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords), file
    forbidden = ("pickle.load", "pickle.loads", "joblib.load", "dill.load", "eval", "exec")
    assert [(file, name) for file, name, _ in calls() if name in forbidden] == []


def test_nothing_of_ours_trusts_code_of_a_repository() -> None:
    for file, name, call in calls():
        for keyword in call.keywords:
            if keyword.arg == "trust_remote_code":
                assert "True" not in ast.unparse(keyword.value), (file, name)
    for path in [*FILES, *(ROOT / "configs").rglob("*.yaml")]:
        assert "trust_remote_code: true" not in path.read_text(), path


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return Path.touch, (self.file,)


def test_an_adapter_that_holds_code_is_not_run(tmp_path: Path) -> None:
    adapted("sira").save_pretrained(tmp_path, save_embedding_layers=False)
    (tmp_path / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.lm_head.weight": Trap(tmp_path / "run")}, tmp_path / "adapter_model.bin")
    with pytest.raises((MoeLoraError, pickle.UnpicklingError)):
        PeftModel.from_pretrained(tiny_model(), str(tmp_path))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["optimizer.pt", "rng_state.pth"])
def test_a_checkpoint_that_holds_code_is_not_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The optimizer's state and its kin are pickles, which the Trainer reads as tensors alone."""
    words = [str(write_run(tmp_path))]
    assert main([*words, "training.save_steps=2", "training.max_steps=3"]) == 0
    checkpoints = tmp_path / "run/checkpoints/adapter"
    for left in (tmp_path / "run/adapter", checkpoints / "checkpoint-3"):
        left.rename(tmp_path / left.name)
    torch.save({"state": Trap(tmp_path / "ran")}, checkpoints / "checkpoint-2" / name)
    assert main([*words, "training.save_steps=2", "training.max_steps=3"]) == 1
    assert "checkpoint-2' cannot be resumed from: " in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a\\b", "/etc", "a\0b", "\x1b[2J", "x" * 300, "", 5])
def test_names_that_lead_elsewhere(name: Any) -> None:
    assert unusable_name(name) is not None
