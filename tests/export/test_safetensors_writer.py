from __future__ import annotations

import json
import weakref
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from moelora.errors import ExportError
from moelora.export.safetensors_writer import DTYPES, Planned, size_of, write_sharded


def tensors() -> dict[str, Tensor]:
    return {f"layer.{i}": torch.arange(float(3 * i + 1)).reshape(1, -1) / 7 for i in range(5)}


def planned() -> list[Planned]:
    return [Planned(name, tuple(tensor.shape), lambda t=tensor: t) for name, tensor in tensors().items()]  # type: ignore[misc]


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_file(tmp_path: Path, dtype: str) -> None:
    assert write_sharded(tmp_path, planned(), dtype, 10**9) == ["model.safetensors"]
    found = load_file(tmp_path / "model.safetensors")
    assert list(found) == sorted(tensors())
    for name, tensor in tensors().items():
        assert torch.equal(found[name], tensor.to(DTYPES[dtype][0]))
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_shards_hold_what_fits(tmp_path: Path) -> None:
    # 4, 16, 28, 40 and 52 bytes
    names = write_sharded(tmp_path, planned(), "float32", 48)
    assert names == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [list(load_file(tmp_path / name)) for name in names] == [
        ["layer.0", "layer.1", "layer.2"],
        ["layer.3"],
        ["layer.4"],
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": 140, "total_parameters": 35}
    assert index["weight_map"]["layer.3"] == names[1]


def test_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        assert [ref for ref in alive if ref() is not None] == []
        tensor = torch.ones(4, 4)
        alive.append(weakref.ref(tensor))
        return tensor

    write_sharded(tmp_path, [Planned(f"t{i}", (4, 4), make) for i in range(6)], "float32", 10**6)
    assert len(alive) == 6


def test_sizes() -> None:
    assert [size_of(words) for words in ("5GB", "1.5 MiB", "200", 7, "2kb")] == [5 * 10**9, 1572864, 200, 7, 2000]
    for words in ("", "GB", "-1", "1TB", "0"):
        with pytest.raises(ExportError, match="max_shard_size"):
            size_of(words)


def test_a_shape_that_was_not_planned(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="as planned"):
        write_sharded(tmp_path, [Planned("a", (2, 2), lambda: torch.ones(3, 2))], "float32", 100)
