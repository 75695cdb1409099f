"""Experts that are dropped or frozen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from moelora.compose import drop_experts, freeze_experts, from_loras, measure_routing
from moelora.errors import ComposeError
from tests.adapters import ROUTED, outputs
from tests.compose.loras import three_loras
from tests.compose.mixtures import loaded, saved, saved_by_sequence, texts, train, weights
from tests.conftest import tiny_model

# What dropping does to outputs is tested against switching off, in test_switch.py.
SITES = ["model.layers.0.self_attn.q_proj", "model.layers.0.mlp.up_proj"]
USAGE = {SITES[0]: torch.tensor([0.4, 0.02, 0.5, 0.08]), SITES[1]: torch.tensor([0.01, 0.5, 0.02, 0.47])}


def on_two_sites(folder: Path) -> Path:
    return saved(folder, "sira", layers_to_transform=[0], target_modules=["q_proj", "up_proj"])


@pytest.mark.parametrize(("below", "gone"), [(0.05, [[1], [0]]), (0.1, [[1, 3], [0, 2]])])
def test_by_usage_each_site_with_its_own_router_drops_its_own(
    tmp_path: Path, below: float, gone: list[list[int]]
) -> None:
    """As many as every site has below the share: of the second site two are below 0.05, of the first one only."""
    old = on_two_sites(tmp_path / "old")
    dropped = drop_experts(old, tmp_path / "new", usage=USAGE, below=below)
    assert dropped.after.num_experts == 4 - len(gone[0])
    before, after = weights(old), weights(tmp_path / "new")
    for site, ids in zip(SITES, gone, strict=True):
        kept = [e for e in range(4) if e not in ids]
        for name in (f"base_model.model.{site}.moelora_{part}.weight" for part in ("A", "B", "router")):
            assert after[name].equal(before[name][kept])
    loaded(tmp_path / "new")


def test_by_usage_experts_with_names_go_everywhere(tmp_path: Path) -> None:
    old = saved_by_sequence(tmp_path / "old")
    found = measure_routing(loaded(old), [{"input_ids": texts(30)}])
    usage = next(iter(found.values())).usage_E
    assert all(each.usage_E.equal(usage) for each in found.values())
    rarest = int(usage.argmin())
    dropped = drop_experts(
        old,
        tmp_path / "new",
        usage={name: each.usage_E for name, each in found.items()},
        below=float(usage.min()) + 1e-6,
    )
    assert dropped.after.num_experts == 2
    kept = [name for e, name in enumerate(("one", "two", "three")) if e != rarest]
    assert loaded(tmp_path / "new").peft_config["default"].experts.names == kept


def test_usage_is_the_share_of_the_choices_without_padding(tmp_path: Path) -> None:
    model = loaded(saved(tmp_path / "a", "mixlora"))
    ids = texts(4)
    one = measure_routing(model, [{"input_ids": ids}])
    padded = torch.cat([ids, torch.zeros(4, 5, dtype=torch.long)], 1)
    two = measure_routing(model, [{"input_ids": padded, "attention_mask": (padded > 0).long()}])
    for name, found in one.items():
        assert float(found.usage_E.sum()) == pytest.approx(1)
        torch.testing.assert_close(found.usage_E, two[name].usage_E)
        torch.testing.assert_close(found.similarity_EE, two[name].similarity_EE, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found.similarity_EE.diagonal(), torch.ones(4))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        pytest.param({"experts": [0, 1, 2, 3]}, "all 4 experts would be dropped; allowed: 1 to 3 of 4", id="all"),
        pytest.param({"experts": []}, "none is named", id="none"),
        pytest.param({"experts": ["9"]}, "no expert '9'", id="unknown"),
        pytest.param({"usage": USAGE, "below": 0.001}, "not every site has an expert with less than 0.001", id="used"),
        pytest.param({"usage": {SITES[0]: USAGE[SITES[0]]}, "below": 0.1}, "the usage of", id="a site is missing"),
        pytest.param({"usage": USAGE}, "drop takes experts, or usage", id="no share"),
    ],
)
def test_what_cannot_be_dropped_leaves_nothing(tmp_path: Path, words: dict[str, Any], message: str) -> None:
    old = on_two_sites(tmp_path / "old")
    with pytest.raises(ComposeError, match=message):
        drop_experts(old, tmp_path / "new", **words)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("preset", ROUTED)
def test_freezing_changes_no_output_and_keeps_what_is_frozen(tmp_path: Path, preset: str) -> None:
    old = saved(tmp_path / "old", preset)
    frozen = freeze_experts(old, tmp_path / "new", [2, 0])
    model = loaded(tmp_path / "new", is_trainable=True)
    model.eval()
    torch.testing.assert_close(outputs(model), outputs(loaded(old)), rtol=1e-3, atol=1e-4)
    assert frozen.after.num_trainable == model.get_nb_trainable_parameters()[0] < frozen.before.num_trainable
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train(model, texts())
    after = dict(model.named_parameters())
    assert any("_frozen" in name and len(p) == 2 for name, p in after.items())
    for name, p in after.items():
        if "_frozen" in name:
            assert p.equal(before[name])
    moved = [name for name, p in after.items() if not p.equal(before[name])]
    assert any("moelora_B" in name for name in moved)
    if preset == "adamole":
        assert "training still moves router.threshold_bias, router.threshold_weight" in frozen.notes[0]
    model.save_pretrained(tmp_path / "trained")
    freed = freeze_experts(tmp_path / "trained", tmp_path / "free", [])
    assert freed.after.num_trainable == frozen.before.num_trainable
    torch.testing.assert_close(outputs(loaded(tmp_path / "free")), outputs(model))


@pytest.mark.parametrize(("dropped", "still"), [([0], 1), ([3], 2), ([0, 1], 0)])
def test_what_stays_of_frozen_experts_stays_frozen(tmp_path: Path, dropped: list[int], still: int) -> None:
    frozen = freeze_experts(saved(tmp_path / "old", "mixlora"), tmp_path / "frozen", [0, 1]).folder
    edit = drop_experts(frozen, tmp_path / "new", dropped)
    config = loaded(edit.folder).peft_config["default"]
    assert (config.experts.num_frozen, config.scores.num_frozen) == (still, still)


def test_what_a_new_set_frees_is_said(tmp_path: Path) -> None:
    frozen = freeze_experts(saved(tmp_path / "old", "mixlora"), tmp_path / "frozen", [0, 1]).folder
    edit = freeze_experts(frozen, tmp_path / "new", [1])
    assert "1 experts that were frozen are trained again: [0]" in edit.notes


def test_a_router_that_is_trained_over_frozen_experts_is_trained_without_some_of_them(tmp_path: Path) -> None:
    model = from_loras(tiny_model(), three_loras(tmp_path), {"kind": "topk", "top_k": 1})
    model.save_pretrained(str(tmp_path / "old"))
    dropped = drop_experts(tmp_path / "old", tmp_path / "new", [2])
    routers = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert dropped.before.num_trainable == sum(p.numel() for p in routers.values())
    assert dropped.after.num_trainable * 3 == dropped.before.num_trainable * 2
