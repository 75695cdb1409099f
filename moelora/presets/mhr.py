"""Multi-head routing."""

from __future__ import annotations

from typing import Any

from moelora.config import MoeLoraConfig
from moelora.preset_registry import preset
from moelora.presets.poly import poly


@preset(paper="2211.03831", verified="PEFT")
def mhr(
    *, r: int = 8, num_experts: int = 4, num_tasks: int = 8, num_splits: int = 4, **peft_words: Any
) -> MoeLoraConfig:
    """MHR (arXiv 2211.03831): `poly` whose inputs and outputs are cut into `num_splits` slices that mix for themselves.

        A = concat_q sum_s w_qs A_qs,   B = concat_q sum_s w_qs B_qs,   y = W0 x + B A x / r

    Each slice has a row of its own in the task's table. The number of slices has to divide the inputs and outputs of
    every adapted linear. Equal to PEFT's `PolyConfig` with `n_splits`; 4 is ours.
    """
    return poly(r=r, num_experts=num_experts, num_tasks=num_tasks, num_splits=num_splits, **peft_words)
