"""Where the library and the programs `train` and `eval` are.

In a clone this package is in the library's folder and the programs are beside that; in a wheel it is beside the library
and the programs are in the library's folder.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

# A wheel has no packages of such common names at its top level.
IN_WHEEL = "_programs"
PROGRAMS = {
    "train": ("train.__main__", "train an adapter from a YAML file"),
    "eval": ("eval.__main__", "score a run or an adapter beside its base model"),
    "compare": ("eval.compare.__main__", "train and score several methods alike"),
}


def library_folder() -> Path:
    """The folder of the package `moelora`, which is not imported."""
    beside = Path(__file__).parents[1] / "moelora"
    return beside if beside.is_dir() else Path(__file__).parents[2]


def programs_folder() -> Path:
    """The folder that holds `train` and `eval`."""
    inside = library_folder() / IN_WHEEL
    return inside if inside.is_dir() else library_folder().parent


def load_program(name: str) -> ModuleType:
    """Import a module of the programs.

    Args:
        name: Its name, such as "eval.page".
    """
    folder = str(programs_folder())
    if sys.path[:1] != [folder]:  # other packages may have modules of these names
        sys.path.insert(0, folder)
    return importlib.import_module(name)


def add_program(commands: Any, name: str) -> None:
    """Add one of the programs to the commands of `moelora`.

    Args:
        commands: The commands.
        name: A key of `PROGRAMS`.
    """
    module, what = PROGRAMS[name]
    program = load_program(module)
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=program.__doc__, epilog=program.EXAMPLES
    )
    program.add_arguments(parser)
    parser.set_defaults(run=program.run, stopped=program.STOPPED)
