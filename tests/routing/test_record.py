"""Records of routing: who hears what, and that nothing is kept where nobody listens."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

from moelora import MoeLoraError, record_routing
from moelora.routing.decision import Routing
from moelora.routing.record import RoutingRecord
from moelora.routing.run import find_hooks
from tests.adapters import BLOCK_PRESETS, PRESETS, adapted
from tests.conftest import tiny_batch, tiny_model

CHECKPOINTING = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def living_routings() -> int:
    gc.collect()
    return sum(type(thing) is Routing for thing in gc.get_objects())


@pytest.mark.parametrize("preset", PRESETS)
def test_records_of_every_mixture(preset: str) -> None:
    model = adapted(preset)
    with record_routing(model) as recorder:
        model(**tiny_batch())
    layers = [record.layer for record in recorder.records]
    if preset in BLOCK_PRESETS:
        assert layers == ["model.layers.0.mlp", "model.layers.1.mlp"]
    elif preset == "lora":
        assert layers == []
    else:
        assert len(layers) == len(set(layers)) == 14
        assert layers[0] == "model.layers.0.self_attn.q_proj"
    for record in recorder.records:
        assert record.adapter == "default"
        assert record.load_E().shape == (record.num_experts,)
        assert record.grad_enabled


def test_every_forward_inside_is_recorded_and_none_outside() -> None:
    model = adapted("mixlora")
    model(**tiny_batch())
    with record_routing(model) as recorder:
        assert recorder.records == []
        with torch.no_grad():
            model(**tiny_batch())
        model(**tiny_batch())
        assert [record.grad_enabled for record in recorder.records] == [False, False, True, True]
        recorder.clear()
        model.train()(**tiny_batch())
        assert len(recorder.records) == 2
    model(**tiny_batch())
    assert len(recorder.records) == 2


def test_listeners_do_not_disturb_each_other() -> None:
    model = adapted("mixlora")
    with record_routing(model) as outer:
        model(**tiny_batch())
        with record_routing(model) as inner:
            model(**tiny_batch())
            inner.clear()
        model(**tiny_batch())
    assert len(outer.records) == 6
    assert inner.records == []


def test_a_layer_called_by_itself_is_not_recorded() -> None:
    model = adapted("mixlora")
    with record_routing(model) as recorder:
        model.base_model.model.model.layers[0].mlp(torch.randn(1, 5, 36))
    assert recorder.records == []


def test_a_model_without_adapter_has_nothing_to_record() -> None:
    with pytest.raises(MoeLoraError, match="LlamaForCausalLM has no moelora adapter"), record_routing(tiny_model()):
        pass


def test_every_active_adapter_is_recorded() -> None:
    model = adapted("mixlora")
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with record_routing(model) as recorder:
        model(**tiny_batch())
    assert [record.adapter for record in recorder.records] == ["default", "other"] * 2


def test_a_disabled_adapter_does_not_route() -> None:
    model = adapted("mixlora")
    with record_routing(model) as recorder, model.disable_adapter():
        model(**tiny_batch())
    assert recorder.records == []


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


@CHECKPOINTING
def test_recomputing_records_nothing(reentrant: bool) -> None:
    model = checkpointed(adapted("mixlora"), reentrant)
    with record_routing(model) as recorder:
        loss = model(**tiny_batch()).loss
        assert len(recorder.records) == 2
        loss.backward()
        assert len(recorder.records) == 2


@pytest.mark.parametrize("preset", ["mixlora", "smora"])
def test_training_without_a_listener_keeps_nothing(preset: str) -> None:
    model = adapted(preset).train()
    before = living_routings()
    for _ in range(2):
        loss = model(**tiny_batch()).loss
        assert living_routings() == before
        loss.backward()


def test_a_listener_keeps_nothing_after_it_is_gone() -> None:
    model = adapted("mixlora").train()
    before = living_routings()
    with record_routing(model) as recorder:
        model(**tiny_batch()).loss.backward()
        assert living_routings() == before + 2
    del recorder
    assert living_routings() == before


@pytest.mark.parametrize("grad", [False, True])
def test_a_listener_may_leave_out_forwards_without_gradients(grad: bool) -> None:
    model = adapted("mixlora")
    hooks = find_hooks(model)
    assert hooks is not None
    with hooks.listening(gradients_only=True) as listener, torch.set_grad_enabled(grad):
        model(**tiny_batch())
    assert len(listener.records) == (2 if grad else 0)


def test_choices_removed_by_expert_dropout_are_no_load() -> None:
    probs_TE = torch.rand(4, 3)
    routing = Routing(
        probs_TE,
        probs_TE,
        torch.rand(4, 2),
        torch.tensor([[0, 1], [0, 1], [0, 1], [2, 0]]),
        torch.tensor([[True, False], [True, True], [False, False], [True, True]]),
    )
    record = RoutingRecord("layer", "default", routing, torch.ones(4, dtype=torch.bool))
    assert record.counts_E().tolist() == [3, 1, 1]
    torch.testing.assert_close(record.load_E(), torch.tensor([0.6, 0.2, 0.2]))


def test_experts_below_a_threshold_are_no_load() -> None:
    probs_TE = torch.rand(3, 3)
    passed_TE = torch.tensor([[True, False, True], [True, False, False], [False, False, True]])
    routing = Routing(probs_TE, probs_TE, probs_TE * passed_TE, ids_TK=None, assigned_TK=passed_TE)
    record = RoutingRecord("layer", "default", routing, torch.tensor([True, True, False]))
    assert record.counts_E().tolist() == [2, 0, 1]
    assert record.valid_tokens == 2
