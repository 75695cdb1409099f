"""Adapters in other forms: native mixture-of-experts models, ordinary LoRAs, the folders of the authors of MixLoRA."""

from moelora.export.compare import Comparison, RoutingFlips, check_export, compare
from moelora.export.distill import distill_lora
from moelora.export.native_moe import NativeMoe, to_native_moe
from moelora.export.plain_loras import export_loras
from moelora.export.tudb.read import read_mixlora
from moelora.export.tudb.write import write_mixlora

__all__ = [
    "Comparison",
    "NativeMoe",
    "RoutingFlips",
    "check_export",
    "compare",
    "distill_lora",
    "export_loras",
    "read_mixlora",
    "to_native_moe",
    "write_mixlora",
]
