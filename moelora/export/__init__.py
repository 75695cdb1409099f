"""Adapters as models and adapters of other kinds."""

from moelora.export.compare import Comparison, RoutingFlips, check_export, compare
from moelora.export.native_moe import NativeMoe, to_native_moe

__all__ = ["Comparison", "NativeMoe", "RoutingFlips", "check_export", "compare", "to_native_moe"]
