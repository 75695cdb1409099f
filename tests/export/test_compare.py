from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from moelora.errors import ExportError
from moelora.export import check_export, compare, to_native_moe
from moelora.export.compare import chosen_by_adapter, chosen_by_native, share_that_differs
from tests.conftest import tiny_model
from tests.export.bases import input_ids, save_pair


@pytest.mark.parametrize("row", ["llama", "qwen2", "granite"])
def test_a_sound_export(tmp_path: Path, row: str) -> None:
    model = save_pair(tmp_path, row)
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    native = AutoModelForCausalLM.from_pretrained(moe.folder).eval()
    found = compare(model, native, input_ids())
    assert found.logit_difference < 1e-4 < 0.1 < found.largest_logit
    assert found.same_greedy
    assert found.tokens == 3 * 19
    ours = chosen_by_adapter(model, input_ids())
    theirs = {layer: ids_TK for layer, (_, ids_TK) in chosen_by_native(native, input_ids()).items()}
    assert ours.keys() == theirs.keys() == {0, 1}
    assert ours[0].shape == (3 * 19, 2)
    assert share_that_differs(ours, theirs) == 0


def test_a_wrong_export_is_noticed(tmp_path: Path) -> None:
    model = save_pair(tmp_path)
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    file = moe.folder / "model.safetensors"
    weights = load_file(file)
    gate = "model.layers.1.block_sparse_moe.gate.weight"
    weights[gate] = weights[gate].roll(1, 0)
    save_file(weights, file, metadata={"format": "pt"})
    native = AutoModelForCausalLM.from_pretrained(moe.folder).eval()
    found = compare(model, native, input_ids())
    assert found.logit_difference > 0.1
    assert not found.same_greedy
    theirs = {layer: ids_TK for layer, (_, ids_TK) in chosen_by_native(native, input_ids()).items()}
    assert share_that_differs(chosen_by_adapter(model, input_ids()), theirs) > 0.2


def test_the_check_of_folders(tmp_path: Path) -> None:
    save_pair(tmp_path, "qwen3")
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    found, flips = check_export(moe.folder, tmp_path / "adapter", tmp_path / "base")
    assert found.logit_difference < 1e-4
    assert found.same_greedy
    assert 0 <= flips.router <= 1
    assert 0 < flips.native < 0.6


def test_layers_without_a_mixture_have_no_choice_to_flip(tmp_path: Path) -> None:
    save_pair(tmp_path, "llama", target_modules=["up_proj"], layers_to_transform=[1])
    moe = to_native_moe(tmp_path / "adapter", tmp_path / "moe")
    found, flips = check_export(moe.folder, tmp_path / "adapter", tmp_path / "base")
    assert found.same_greedy
    assert flips.router < 0.5


def test_the_share_counts_sets() -> None:
    first = {0: torch.tensor([[0, 1], [2, 3]]), 1: torch.tensor([[0, 1], [0, 2]]), 2: torch.tensor([[9, 9]])}
    second = {0: torch.tensor([[1, 0], [2, 1]]), 1: torch.tensor([[0, 1], [2, 0]])}
    assert share_that_differs(first, second) == 0.25


def test_a_model_without_routers() -> None:
    with pytest.raises(ExportError, match="has no routers"):
        chosen_by_native(tiny_model("llama"), input_ids())
