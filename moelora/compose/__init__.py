"""Life after training: mixtures of LoRAs that exist, edits of experts, and switching them off and on."""

from __future__ import annotations

from moelora.compose.assemble import from_loras
from moelora.compose.choose import Chosen, choose
from moelora.compose.editing import (
    add_experts,
    cut_ranks,
    drop_experts,
    fit_centroid,
    fit_router_rows,
    freeze_experts,
    mean_loss,
    measure_routing,
    merge_experts,
    split_lora,
)
from moelora.compose.switch import switch_experts
from moelora.compose.xlora_folders import read_xlora, write_xlora

__all__ = [
    "Chosen",
    "add_experts",
    "choose",
    "cut_ranks",
    "drop_experts",
    "fit_centroid",
    "fit_router_rows",
    "freeze_experts",
    "from_loras",
    "mean_loss",
    "measure_routing",
    "merge_experts",
    "read_xlora",
    "split_lora",
    "switch_experts",
    "write_xlora",
]
