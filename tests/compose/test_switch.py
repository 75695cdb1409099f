"""Experts that are switched off and on; and the edits that should do the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import get_peft_model

from moelora import record_routing
from moelora.compose import drop_experts, switch_experts
from moelora.errors import ComposeError
from tests.adapters import ROUTED, adapted, outputs, shake, small_config
from tests.compose.mixtures import loaded, saved, saved_by_sequence, texts
from tests.conftest import tiny_model


@pytest.mark.parametrize("preset", ROUTED)
def test_off_is_as_if_dropped_and_on_gives_the_bits_of_before(tmp_path: Path, preset: str) -> None:
    old = saved(tmp_path / "old", preset)
    model = loaded(old)
    before = outputs(model)
    E = model.peft_config["default"].experts.num_experts
    gone = {1, E - 1}
    assert switch_experts(model, dict.fromkeys(gone, False)) == [e for e in range(E) if e not in gone]
    off = outputs(model)
    assert not torch.allclose(off, before, atol=1e-3)
    drop_experts(old, tmp_path / "new", sorted(gone))
    torch.testing.assert_close(outputs(loaded(tmp_path / "new")), off, rtol=1e-3, atol=1e-4)
    assert switch_experts(model, dict.fromkeys(gone, True)) == list(range(E))
    assert outputs(model).equal(before)


@pytest.mark.parametrize("preset", ROUTED)
def test_nobody_is_sent_to_an_expert_that_is_off(preset: str) -> None:
    model = adapted(preset)
    switch_experts(model, {0: False})
    with record_routing(model) as listener:
        outputs(model)
    assert listener.records
    for record in listener.records:
        assert not record.routing.gates_TE()[:, 0].any()
        assert record.routing.gates_TE().abs().sum() > 0
        assert (record.routing.logits_TE[:, 0] == float("-inf")).all()


@pytest.mark.parametrize("preset", ["molora", "mixlora"])
def test_all_off_is_the_base(preset: str) -> None:
    """Of a mixture of feed-forward blocks too; a plain LoRA beside the mixtures is no expert and stays."""
    model = adapted(preset, target_modules=["gate_proj", "up_proj", "down_proj"])
    assert switch_experts(model, dict.fromkeys(range(4), False)) == []
    assert outputs(model).equal(outputs(tiny_model()))
    switch_experts(model, {2: True})
    assert not torch.allclose(outputs(model), outputs(tiny_model()))


def test_with_fewer_experts_than_choices_a_token_gets_them_all() -> None:
    model = adapted("mixlora")
    switch_experts(model, {0: False, 1: False, 3: False})
    with record_routing(model) as listener:
        outputs(model)
    for record in listener.records:
        assert record.routing.gates_TE()[:, 2].eq(1).all()


def test_a_sequence_goes_to_the_next_nearest(tmp_path: Path) -> None:
    model = loaded(saved_by_sequence(tmp_path / "a"))

    def chosen() -> tuple[list[int], torch.Tensor]:
        with record_routing(model) as listener, torch.no_grad():
            model(input_ids=texts())
        routing = listener.records[0].routing
        assert routing.ids_TK is not None
        return routing.ids_TK[:, 0].tolist(), routing.logits_TE

    before, logits_TE = chosen()
    assert len(set(before)) > 1
    gone = before[0]
    names = ["one", "two", "three"]
    assert switch_experts(model, {names[gone]: False}) == [name for name in names if name != names[gone]]
    found, _ = chosen()
    expected = logits_TE.index_fill(1, torch.tensor([gone]), float("-inf")).argmax(-1)
    assert found == expected.tolist() != before


def test_adapters_are_switched_apart() -> None:
    model = get_peft_model(tiny_model(), small_config("molora"), adapter_name="first")
    model.add_adapter("second", small_config("molora"))
    shake(model)
    model.eval()
    before = {}
    for name in ("first", "second"):
        model.set_adapter(name)
        before[name] = outputs(model)
    switch_experts(model, {1: False}, adapter="first")
    for name in ("first", "second"):
        model.set_adapter(name)
        assert outputs(model).equal(before[name]) == (name == "second")


def test_what_is_not_there_is_not_switched(tmp_path: Path) -> None:
    model = loaded(saved_by_sequence(tmp_path / "a"))
    before = [p.clone() for p in model.parameters()]
    with pytest.raises(
        ComposeError, match="no expert 'four' in adapter 'default'; allowed: one, two, three, or 0 to 2"
    ):
        switch_experts(model, {"one": False, "four": False})
    with pytest.raises(ComposeError, match="no mixture of an adapter 'other'; allowed: default"):
        switch_experts(model, {"one": False}, adapter="other")
    with pytest.raises(ComposeError, match="allowed: a model with a mixture"):
        switch_experts(tiny_model(), {0: False})
    assert switch_experts(model, {}) == ["one", "two", "three"]
    assert all(a.equal(b) for a, b in zip(model.parameters(), before, strict=True))


def test_the_active_adapter_is_switched() -> None:
    model = adapted("mixlora")
    model.add_adapter("second", small_config("mixlora"))
    shake(model, seed=2)
    model.set_adapter("second")
    switch_experts(model, {0: False})
    layers = [layer for layer in model.modules() if hasattr(layer, "routers") and layer.routers]
    assert {(layer.routers["default"].on, layer.routers["second"].on) for layer in layers} == {(None, (1, 2, 3))}
    model.base_model.set_adapter(["default", "second"])
    with pytest.raises(ComposeError, match="default, second; allowed: .* one active adapter"):
        switch_experts(model, {0: False})


@pytest.mark.parametrize("given", [["a"], {0: "no"}, {0: 1}])
def test_only_true_and_false_switch(given: object) -> None:
    with pytest.raises(ComposeError, match="a dict of True .on. or False .off."):
        switch_experts(adapted("mixlora"), given)  # type: ignore[arg-type]


def test_an_edge_of_a_tree_is_not_switched() -> None:
    model = adapted("smore")
    with pytest.raises(
        ComposeError, match=r"the selection of adapter 'default' is 'tree_top'; allowed: .* edge of a tree"
    ):
        switch_experts(model, {0: False})
    assert outputs(model).isfinite().all()
