"""Experts that are merged or cut to a lower rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moelora.compose import cut_ranks, measure_routing, merge_experts
from moelora.compose.editing import SiteRouting
from moelora.compose.editing.low_rank import cut
from moelora.errors import ComposeError
from tests.adapters import PRESETS, outputs
from tests.compose.mixtures import change_weights, loaded, saved, saved_by_sequence, texts, weights

SITE = "model.layers.1.mlp.down_proj"
USAGE = torch.tensor([0.3, 0.1, 0.4, 0.2])
# expert 1 is most like 0, expert 3 most like 2
ALIKE = torch.tensor([[1.0, 0.9, 0.1, 0.2], [0.9, 1.0, 0.3, 0.1], [0.1, 0.3, 1.0, 0.8], [0.2, 0.1, 0.8, 1.0]])


def one_site(folder: Path, preset: str = "molora", **words: int) -> Path:
    return saved(folder, preset, layers_to_transform=[1], target_modules=["down_proj"], **words)


def part(folder: Path, name: str) -> Tensor:
    return weights(folder)[f"base_model.model.{SITE}.moelora_{name}.weight"]


@pytest.mark.parametrize("preset", ["molora", "hydralora"])
def test_a_group_becomes_the_mean_by_usage(tmp_path: Path, preset: str) -> None:
    """Golden: {0, 1} with weights 3/4 and 1/4, {2, 3} with 2/3 and 1/3; of rank 1, so that no cut loses a thing."""
    old = one_site(tmp_path / "old", preset)
    b_EOR = part(old, "B").clone()
    b_EOR[..., 1:] = 0
    change_weights(old, {f"base_model.model.{SITE}.moelora_B.weight": b_EOR})
    merged = merge_experts(old, tmp_path / "new", num_experts=2, routing={SITE: SiteRouting(USAGE, ALIKE)})
    assert (merged.before.num_experts, merged.after.num_experts) == (4, 2)
    products = torch.matmul(part(old, "B"), part(old, "A"))
    found = torch.matmul(part(tmp_path / "new", "B"), part(tmp_path / "new", "A"))
    expected = torch.stack([0.75 * products[0] + 0.25 * products[1], 2 / 3 * products[2] + 1 / 3 * products[3]])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    rows = part(old, "router")
    expected_rows = torch.stack([0.75 * rows[0] + 0.25 * rows[1], 2 / 3 * rows[2] + 1 / 3 * rows[3]])
    torch.testing.assert_close(part(tmp_path / "new", "router"), expected_rows)
    loaded(tmp_path / "new")


def test_a_lone_expert_stays_as_it_is(tmp_path: Path) -> None:
    old = one_site(tmp_path / "old")
    usage = torch.tensor([0.3, 0.1, 0.4, 0.2])
    merge_experts(old, tmp_path / "new", num_experts=3, routing={SITE: SiteRouting(usage, ALIKE)})
    for name in ("A", "B", "router"):
        assert part(tmp_path / "new", name)[1:].equal(part(old, name)[2:])


def test_a_fixed_mix_of_what_is_merged_stays_the_function(tmp_path: Path) -> None:
    """Weights of a group add up, and its product is their mean by the same weights."""
    old = saved_by_sequence(tmp_path / "old")
    words = json.loads((old / "adapter_config.json").read_text())
    words |= {"scores": {"kind": "constant", "weights": [0.5, 0.2, 0.3]}, "selection": {"kind": "dense"}}
    (old / "adapter_config.json").write_text(json.dumps(words))
    found = {name: t for name, t in weights(old).items() if "router" not in name}
    from safetensors.torch import save_file

    rank_one = {
        name: t.index_fill(2, torch.tensor([1, 2]), 0) if "moelora_B" in name else t for name, t in found.items()
    }
    save_file(rank_one, old / "adapter_model.safetensors", metadata={"format": "pt"})
    model = loaded(old)
    merged = merge_experts(
        old, tmp_path / "new", num_experts=2, routing=measure_routing(model, [{"input_ids": texts()}])
    )
    torch.testing.assert_close(outputs(loaded(tmp_path / "new")), outputs(model), rtol=1e-3, atol=1e-4)
    config = loaded(tmp_path / "new").peft_config["default"]
    assert len(config.experts.names) == 2
    assert any("+" in name for name in config.experts.names)
    assert sum(config.scores.weights) == pytest.approx(1)
    assert "100.00% at the least" in merged.notes[0]


def test_merging_by_what_was_measured(tmp_path: Path) -> None:
    old = saved(tmp_path / "old", "mixlora")
    found = measure_routing(loaded(old), [{"input_ids": texts()}])
    merged = merge_experts(old, tmp_path / "new", num_experts=2, routing=found)
    assert merged.after.num_experts == 2
    assert outputs(loaded(tmp_path / "new")).isfinite().all()
    for number in (0, 4):
        with pytest.raises(ComposeError, match=f"num_experts is {number}; allowed: 1 to 3"):
            merge_experts(old, tmp_path / "other", num_experts=number, routing=found)


def test_a_cut_is_the_best_approximation() -> None:
    """Eckart-Young, against the SVD of the whole matrix."""
    a_MD, b_OM = torch.randn(7, 13), torch.randn(11, 7)
    u, s, vh = torch.linalg.svd(b_OM @ a_MD)
    for rank in (1, 3, 7):
        found = cut(a_MD, b_OM, rank)
        best = u[:, :rank] * s[:rank] @ vh[:rank]
        torch.testing.assert_close(found.b_OR @ found.a_RD, best, rtol=1e-4, atol=1e-4)
        assert found.kept == pytest.approx(float(s[:rank].square().sum() / s.square().sum()), rel=1e-5)
    wide = cut(a_MD, b_OM, 9)
    assert wide.a_RD.shape == (9, 13)
    torch.testing.assert_close(wide.b_OR @ wide.a_RD, b_OM @ a_MD, rtol=1e-4, atol=1e-4)
    assert cut(torch.zeros(2, 3), torch.zeros(4, 2), 1).kept == 1


@pytest.mark.parametrize("preset", [preset for preset in PRESETS if preset != "smora"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_rank_that_is_not_used_is_cut_without_a_loss(tmp_path: Path, preset: str, use_rslora: bool) -> None:
    old = saved(tmp_path / "old", preset, use_rslora=use_rslora)
    thin = {name: t.index_fill(2, torch.tensor([1]), 0) for name, t in weights(old).items() if "moelora_B" in name}
    change_weights(old, thin)
    done = cut_ranks(old, tmp_path / "new", rank=2)
    assert done.after.num_parameters < done.before.num_parameters
    torch.testing.assert_close(outputs(loaded(tmp_path / "new")), outputs(loaded(old)), rtol=1e-3, atol=1e-4)
    with pytest.raises(ComposeError, match="rank is 3; allowed: 1 to 2"):
        cut_ranks(old, tmp_path / "other", rank=3)
    lossy = cut_ranks(old, tmp_path / "lossy", rank=1)
    assert "100.00% at the least" not in lossy.notes[0]
