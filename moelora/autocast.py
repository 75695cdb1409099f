"""Autocast by device, also of the meta device, which has none: torch refuses the question there."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast computes products in on a device now; None where it is off."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def no_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Autocast is off inside."""
    return nullcontext() if device.type == "meta" else torch.autocast(device.type, enabled=False)
