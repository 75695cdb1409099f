"""An environment with moelora installed from a wheel or an sdist, and nothing of the clone."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import pytest
import torch

ROOT = Path(__file__).parents[1]
SITE = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"


def install(kind: Literal["wheel", "sdist"], folder: Path) -> Path:
    """Install moelora into a new environment that sees the packages of this one, but not its moelora.

    Args:
        kind: What is installed: the one of `make release` in MOELORA_DIST, or else one that is built here.
        folder: Gets the environment.

    Returns:
        Its Python.
    """
    given = os.environ.get("MOELORA_DIST")
    if given is None:
        builders = pytest.importorskip(f"hatchling.builders.{kind}")
        builder = builders.WheelBuilder if kind == "wheel" else builders.SdistBuilder
        list(builder(str(ROOT)).build(directory=str(folder / "dist"), versions=["standard"]))
    (file,) = Path(given or folder / "dist").glob("*.whl" if kind == "wheel" else "*.tar.gz")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], check=True)
    # a line of a .pth file is a folder to look into, whose own .pth files, such as that of the clone, are not read
    (folder / "env" / SITE / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    python = folder / "env" / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "-q", "--ignore-installed", "--no-deps"]
    subprocess.run([*pip, "--no-index", "--no-build-isolation", "--no-compile", str(file)], check=True)
    return python


def run(python: Path, place: Path, words: Sequence[str]) -> str:
    """What a program of the environment prints.

    Args:
        python: The environment's Python.
        place: The working folder.
        words: Its arguments.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(python), "-W", "ignore", *words],
        cwd=place,
        env=environment | {"PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2500:] + done.stderr[-2500:]
    return done.stdout
