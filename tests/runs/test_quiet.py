from __future__ import annotations

import importlib.util
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from moelora.runs.quiet import drop_kernel_notice

ROOT = Path(__file__).parents[2]


def test_one_line_is_dropped_and_the_rest_is_kept(caplog: pytest.LogCaptureFixture) -> None:
    drop_kernel_notice()
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    logger.warning("Failed to load CPU gemm_4bit_forward from kernels-community: %s.", "No module named 'kernels'")
    logger.warning("Failed to load something else")
    assert [record.getMessage() for record in caplog.records] == ["Failed to load something else"]


_SCRIPT = """
import logging, runpy, sys

logger = logging.getLogger("bitsandbytes.backends.cpu.ops")

class PeftIsNextError(BaseException):
    pass

class BeforePeft:
    def find_spec(self, name, *_):
        if name == "peft":
            raise PeftIsNextError

finder = BeforePeft()
sys.meta_path.insert(0, finder)
for line in sys.argv[1:]:
    module, *words = line.split()
    sys.argv = [module, *words]
    try:
        runpy.run_module(module, run_name="__main__")
    except PeftIsNextError:
        print(module, "quiet" if logger.filters else "loud")
    for name in [name for name in sys.modules if name.partition(".")[0] in ("moelora", "moelora_cli", "train", "eval")]:
        del sys.modules[name]
    logger.filters.clear()
sys.meta_path.remove(finder)
import moelora
print(*sorted({"peft", "bitsandbytes"} & set(sys.modules)))
"""
PROGRAMS = {
    "moelora_cli": "inspect ./nowhere",
    "train": "nowhere.yaml",
    "eval": "nowhere/adapter --suite nothing",
    "eval.lm_eval": "--help",
    "eval.speed.profile": "",
}


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
def test_no_program_prints_what_bitsandbytes_says_when_it_is_imported() -> None:
    """Each program runs up to its import of PEFT, which imports bitsandbytes: the line is dropped by then.

    All in one process, since each start is seconds of importing torch.
    """
    lines = [f"{module} {words}" for module, words in PROGRAMS.items()]
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, *lines], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )
    assert done.stdout.splitlines() == [*(f"{module} quiet" for module in PROGRAMS), "bitsandbytes peft"], done.stderr
    assert "Failed to load CPU" not in done.stderr
