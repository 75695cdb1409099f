"""A MixLoRA-like adapter on a dense base is a native mixture-of-experts model: writing it as one."""

from moelora.export.native_moe.write import NativeMoe, to_native_moe

__all__ = ["NativeMoe", "to_native_moe"]
