"""Where the programs `train` and `eval` are: beside the package in a clone, inside it in a wheel."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

# A wheel has no packages of such common names at its top level.
IN_WHEEL = "_programs"


def programs_folder() -> Path:
    """The folder that holds `train` and `eval`."""
    package = Path(__file__).parents[1]
    inside = package / IN_WHEEL
    return inside if inside.is_dir() else package.parent


def load_program(name: str) -> ModuleType:
    """Import a module of the programs.

    Args:
        name: Its name, such as "eval.page".
    """
    folder = str(programs_folder())
    if folder not in sys.path:
        sys.path.insert(0, folder)
    return importlib.import_module(name)
