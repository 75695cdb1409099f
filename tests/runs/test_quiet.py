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


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
@pytest.mark.parametrize(
    "words",
    [
        ["-m", "moelora_cli", "inspect", "./nowhere"],
        ["-m", "train", "nowhere.yaml"],
        ["-m", "eval", "nowhere/adapter", "--suite", "nothing"],
        ["-m", "eval.lm_eval", "--help"],
        ["-c", "import eval.speed.profile"],
    ],
    ids=["moelora", "train", "eval", "lm_eval", "speed"],
)
def test_no_program_prints_what_bitsandbytes_says_when_it_is_imported(words: list[str]) -> None:
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300)
    assert "Failed to load CPU" not in done.stdout + done.stderr
    # the program came to its own work: nothing else went wrong before
    assert "Traceback" not in done.stderr
