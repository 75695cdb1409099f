"""Life after training: edit the experts of a mixture, and switch them off and on."""

from __future__ import annotations

from moelora.compose.editing import (
    add_experts,
    cut_ranks,
    drop_experts,
    fit_centroid,
    freeze_experts,
    mean_loss,
    measure_routing,
    merge_experts,
    split_lora,
)
from moelora.compose.switch import switch_experts

__all__ = [
    "add_experts",
    "cut_ranks",
    "drop_experts",
    "fit_centroid",
    "freeze_experts",
    "mean_loss",
    "measure_routing",
    "merge_experts",
    "split_lora",
    "switch_experts",
]
