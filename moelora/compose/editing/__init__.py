"""Edit the experts of a trained mixture, from folder to folder: no base model is needed, and no input is changed."""

from __future__ import annotations

from moelora.compose.editing.add import add_experts
from moelora.compose.editing.centroid import fit_centroid, fit_router_rows
from moelora.compose.editing.edit import Edit, Size
from moelora.compose.editing.measure import SiteRouting, mean_loss, measure_routing
from moelora.compose.editing.merge import cut_ranks, merge_experts
from moelora.compose.editing.remove import drop_experts, freeze_experts
from moelora.compose.editing.split import split_lora
from moelora.compose.editing.stacked import StackedAdapter, read_stacked

__all__ = [
    "Edit",
    "SiteRouting",
    "Size",
    "StackedAdapter",
    "add_experts",
    "cut_ranks",
    "drop_experts",
    "fit_centroid",
    "fit_router_rows",
    "freeze_experts",
    "mean_loss",
    "measure_routing",
    "merge_experts",
    "read_stacked",
    "split_lora",
]
