from __future__ import annotations

import importlib.metadata
import json
import subprocess
from pathlib import Path

import torch

from eval.receipt import git_state, machine, make_receipt, package_versions


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", *identity, "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def test_git_state_names_the_commit_and_whether_it_was_changed(tmp_path: Path) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init", "-q")
    assert git_state(tmp_path) is None
    (tmp_path / "file").write_text("a")
    git(tmp_path, "add", "file")
    git(tmp_path, "commit", "-q", "-m", "one")
    clean = {"commit": git(tmp_path, "rev-parse", "HEAD"), "dirty": False}
    assert git_state(tmp_path) == clean
    (tmp_path / "untracked").write_text("a")
    assert git_state(tmp_path) == clean
    results = tmp_path / "eval" / "results"
    results.mkdir(parents=True)
    (results / "table").write_text("a")
    git(tmp_path, "add", "eval")
    git(tmp_path, "commit", "-q", "-m", "two")
    clean["commit"] = git(tmp_path, "rev-parse", "HEAD")
    (results / "table").write_text("b")
    assert git_state(tmp_path) == clean
    assert git_state(results.parent) == clean
    (tmp_path / "file").write_text("b")
    assert git_state(tmp_path) == {**clean, "dirty": True}


def test_package_versions_are_the_installed_ones() -> None:
    versions = package_versions()
    for package in ("torch", "transformers", "peft", "reasoning-gym"):
        assert versions[package] == importlib.metadata.version(package)
    assert versions["moelora"]


def test_a_receipt_is_json_and_has_what_was_given() -> None:
    receipt = make_receipt(config={"model": "m"}, seeds={"rows": 3}, seconds=1.26, command="moelora eval x")
    again = json.loads(json.dumps(receipt))
    assert again["config"] == {"model": "m"}
    assert again["seeds"] == {"rows": 3}
    assert again["wall_seconds"] == 1.3
    assert again["command"] == "moelora eval x"
    assert again["machine"]["threads"] == torch.get_num_threads()
    assert machine()["cores"] >= 1
