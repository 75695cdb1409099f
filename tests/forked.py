"""Programs as processes of their own, forked from one that has their libraries: importing them takes ten seconds.

The server that forks them has run nothing but imports, none of them of ours, so that its children begin as a fresh
Python does.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["peft", "trl.trainer.sft_trainer", "trl.trainer.dpo_trainer", "lm_eval"])


def start(
    program: str,
    *words: str,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
    without: Sequence[str] = (),
) -> BaseProcess:
    """Start a program in the working folder.

    Args:
        program: A module, as after `python -m`; the file of a script; or its text, as after `python -c`.
        *words: Its arguments.
        environment: All of its environment, of which libraries that read it as they are imported see nothing; None is
            that of this process.
        output: Gets what it prints, on standard output and, with the ending `.err` added, on standard error; None
            throws it away.
        without: Packages that it cannot import.
    """
    given = dict(os.environ if environment is None else environment)
    process = _SERVER.Process(target=_main, args=(program, words, given, output, without))
    process.start()
    return process


def run(program: str, *words: str, folder: Path, without: Sequence[str] = ()) -> str:
    """What a program prints on standard output; it must end well.

    Args:
        program: As in `start`.
        *words: As there.
        folder: Gets what it prints.
        without: As there.
    """
    output = folder / "printed"
    process = start(program, *words, output=output, without=without)
    process.join()
    assert process.exitcode == 0, Path(f"{output}.err").read_text()[-6000:]
    return output.read_text()


def _main(
    program: str, words: tuple[str, ...], environment: dict[str, str], output: Path | None, without: Sequence[str]
) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, ending in ((1, ""), (2, ".err")):
        file = os.devnull if output is None else f"{output}{ending}"
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    sys.modules.update(dict.fromkeys(without))  # type: ignore[arg-type]
    sys.argv = [program, *words]
    if "\n" in program:
        exec(compile(program, "<script>", "exec"), {"__name__": "__main__"})
    elif program.endswith(".py"):
        runpy.run_path(program, run_name="__main__")
    else:
        runpy.run_module(program, run_name="__main__", alter_sys=True)
