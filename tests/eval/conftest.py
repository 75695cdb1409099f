from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.eval.tiny_suite import write_rows


@pytest.fixture
def commonsense(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with rows of the commonsense tasks, which MOELORA_DATA_DIR names."""
    folder = write_rows(tmp_path_factory.mktemp("rows"))
    monkeypatch.setenv("MOELORA_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def few_tasks_of_lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let lm-eval find only its ARC tasks: reading the thousands that it comes with takes ten seconds."""
    from lm_eval.tasks import manager

    shutil.copytree(Path(manager.__file__).parent / "arc", tmp_path / "tasks" / "arc")
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "tasks" / "manager.py"))
