"""Which data type a base model is fastest in on this machine.

A CPU without instructions for bfloat16 (most of those with AVX2 alone) computes products in it many times slower than
in float32; one that has them computes them faster. No table of processors says so reliably, hence it is measured.
"""

from __future__ import annotations

import time
from functools import cache
from typing import Literal

import torch
from torch.nn.functional import linear

from moelora.runs.console import say

# Rows, columns and inner dimension of the product that is timed: a linear of a small model.
_SHAPE = (256, 1536, 576)
# Below this ratio the narrow type is no slower in practice: it moves half the memory.
_SLOWER = 1.5


def fastest_dtype() -> Literal["bfloat16", "float32"]:
    """bfloat16, unless this machine computes it slower than float32."""
    if torch.accelerator.is_available():
        emulated = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
        return "float32" if emulated else "bfloat16"
    return "float32" if cpu_slowdown("bfloat16") > _SLOWER else "bfloat16"


def say_if_slow(dtype: str) -> None:
    """Print a line when the weights are to be of a data type that this CPU is slow in."""
    if dtype == "float32" or torch.accelerator.is_available():
        return
    slowdown = cpu_slowdown(dtype)
    if slowdown > _SLOWER:
        say(f"Slow      this CPU computes {dtype} {slowdown:.0f} times slower than float32: set dtype to float32")


@cache
def cpu_slowdown(dtype: str) -> float:
    """How many times as long as in float32 a product takes in another data type, on the CPU."""
    return _seconds(getattr(torch, dtype)) / _seconds(torch.float32)


def _seconds(dtype: torch.dtype) -> float:
    rows, columns, inner = _SHAPE
    inputs = torch.ones(rows, inner, dtype=dtype)
    weight = torch.ones(columns, inner, dtype=dtype)
    # The first call also chooses a kernel; the fastest of the others is the one that nothing interrupted.
    return min(_once(inputs, weight) for _ in range(4))


def _once(inputs: torch.Tensor, weight: torch.Tensor) -> float:
    started = time.perf_counter()
    linear(inputs, weight)
    return time.perf_counter() - started
