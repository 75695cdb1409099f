"""Scratch memory that is kept between calls.

A fresh tensor of a few megabytes on the CPU costs more in page faults than most element-wise operations on it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_local = threading.local()


def scratch(name: str, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """An uninitialised [rows, columns] tensor on the CPU, the same memory at each call with the same name.

    It is valid until the next call with that name from the same thread; never return or save it.

    Args:
        name: Who asks; names in use at the same time must differ.
        rows, columns: Size.
        dtype: Type.
    """
    buffers: dict[tuple[str, torch.dtype], Tensor] = _local.__dict__.setdefault("buffers", {})
    flat = buffers.get((name, dtype))
    if flat is None or flat.numel() < rows * columns:
        flat = torch.empty(rows * columns, dtype=dtype)
        buffers[name, dtype] = flat
    return flat[: rows * columns].view(rows, columns)
