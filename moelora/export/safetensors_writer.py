"""Writing sharded safetensors files whose tensors are made one after the other.

`safetensors.torch.save_file` wants all tensors of a file in memory. The format needs only their names, types and shapes
ahead: eight bytes with the length of a JSON header, the header, and the values in its order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from moelora.errors import ExportError
from moelora.progress import track

DTYPES = {"float32": (torch.float32, "F32"), "bfloat16": (torch.bfloat16, "BF16"), "float16": (torch.float16, "F16")}
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


class Planned(NamedTuple):
    """A tensor to write.

    Attributes:
        name: Its name.
        shape: Its shape.
        make: Makes it, of any floating dtype.
    """

    name: str
    shape: tuple[int, ...]
    make: Callable[[], Tensor]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def size_of(words: str | int) -> int:
    """Bytes of a size such as "5GB", "200MiB" or a number.

    Raises:
        ExportError: If it is none.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", str(words).strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found and found[2] in _UNITS else 0
    if size < 1:
        raise ExportError(f"max_shard_size is {words!r}; allowed: a number of bytes, such as '5GB', '200MB', '1GiB'.")
    return size


def write_sharded(folder: Path, tensors: Sequence[Planned], dtype: str, max_shard_size: int) -> list[str]:
    """Write model.safetensors, or shards with their index, with no more than one tensor in memory.

    Args:
        folder: Where to.
        tensors: The tensors in their order.
        dtype: One of `DTYPES`.
        max_shard_size: Bytes of one file; a tensor that is larger has a file to itself.

    Returns:
        Names of the files with weights.
    """
    width = DTYPES[dtype][0].itemsize
    shards: list[list[Planned]] = []
    room = 0
    for tensor in tensors:
        if not shards or tensor.numel * width > room:
            shards.append([])
            room = max_shard_size
        shards[-1].append(tensor)
        room -= tensor.numel * width
    count = len(shards)
    names = (
        [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)] if count > 1 else ["model.safetensors"]
    )
    for name, shard in track(list(zip(names, shards, strict=True)), "writing files"):
        _write(folder / name, shard, dtype)
    if count > 1:
        places = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(tensor.numel for tensor in tensors)
        index = {"metadata": {"total_size": total * width, "total_parameters": total}, "weight_map": places}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return names


def _write(file: Path, tensors: Sequence[Planned], dtype: str) -> None:
    torch_dtype, word = DTYPES[dtype]
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in tensors:
        start, end = end, end + tensor.numel * torch_dtype.itemsize
        header[tensor.name] = {"dtype": word, "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with file.open("wb") as handle:
        handle.write(len(text).to_bytes(8, "little"))
        handle.write(text)
        for tensor in track(tensors, f"writing {file.name}"):
            _write_values(handle, tensor, dtype)


def _write_values(handle: BinaryIO, tensor: Planned, dtype: str) -> None:
    """A function of its own, so that nothing holds a tensor while the next one is made."""
    made = tensor.make()
    if tuple(made.shape) != tensor.shape:
        raise AssertionError(f"{tensor.name} is {list(made.shape)}, not {list(tensor.shape)} as planned")
    cast = made.to(DTYPES[dtype][0]).contiguous()
    if not cast.isfinite().all():
        raise ExportError(
            f"{tensor.name} has values that are not finite in {dtype}; allowed: finite weights. Export in bfloat16 or "
            "float32, or look at the adapter."
        )
    handle.write(cast.view(torch.uint8).numpy().data)
