"""The recorder: who hears what, and when; nothing leaks or counts twice, and recomputing routes as the forward did."""

from __future__ import annotations

import copy
import gc
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora import MoeLoraError, record_routing
from moelora.ops import reference
from moelora.routing.decision import Routing
from moelora.routing.recorder import find_recorder
from tests.adapters import PRESETS, adapted
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close

CHECKPOINTING = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def gradients(model: nn.Module, batch: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
    """Gradients of the model's own loss."""
    model.zero_grad()
    model(**(batch or tiny_batch())).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def biases(model: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in model.named_buffers() if name.endswith("moelora_router.default.bias")]


def living_routings() -> int:
    gc.collect()
    return sum(type(thing) is Routing for thing in gc.get_objects())


@pytest.mark.parametrize("preset", PRESETS)
def test_records_of_every_mixture(preset: str) -> None:
    model = adapted(preset)
    with record_routing(model) as recorder:
        model(**tiny_batch())
    layers = [record.layer for record in recorder.records]
    if preset in ("mixlora", "random_router"):
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


def test_a_failed_forward_closes_the_recorder() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    before = biases(model)
    with record_routing(model) as recorder:
        with pytest.raises(RuntimeError, match="out of memory"):
            with_failure(model, lambda: model(**tiny_batch()))
        recorder.clear()
        model.base_model.model.model.layers[0].mlp.gate_proj(torch.randn(1, 5, 36))
        assert recorder.records == []
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))


def with_failure(model: Any, call: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    try:
        call()
    finally:
        handle.remove()


def test_a_deep_copy_has_a_recorder_of_its_own() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
        recorder.clear()
        twin = copy.deepcopy(model)
        with record_routing(twin) as twins:
            twin(**tiny_batch())
        assert len(twins.records) == 14
        assert recorder.records == []
    own = find_recorder(twin)
    assert own is not find_recorder(model)
    assert all(layer.recorder is own for layer in twin.modules() if hasattr(layer, "recorder"))


def test_a_deep_copy_trains_on_as_the_original() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    gradients(model)
    twin = copy.deepcopy(model)
    for _ in range(2):
        expected, found = gradients(model), gradients(twin)
        assert all(torch.equal(found[name], grad) for name, grad in expected.items())
    assert all(torch.equal(a, b) for a, b in zip(biases(twin), biases(model), strict=True))


def test_pickling_forgets_listeners_and_records() -> None:
    model = adapted("mixlora")
    recorder = find_recorder(model)
    assert recorder is not None
    assert recorder.expects_loss
    with record_routing(model):
        model(**tiny_batch())
        restored = pickle.loads(pickle.dumps(recorder))
    assert restored.expects_loss
    with restored.listening() as listener:
        assert listener.records == []


def test_unloading_removes_every_hook() -> None:
    for name in ("llama", "t5"):
        model = adapted("sira", name)
        base = model.unload()
        assert find_recorder(base) is None
        for module in base.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


def test_the_bias_moves_once_a_training_forward() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    before = biases(model)
    with record_routing(model) as recorder:
        loss = model(**tiny_batch()).loss
    assert len(before) == len(recorder.records) == 14
    expected = []
    for bias_E, record in zip(before, recorder.records, strict=True):
        assert record.routing.ids_TK is not None
        expected.append(reference.bias_update(bias_E, record.routing.ids_TK[record.valid_T], 0.1))
    for moved, bias_E in zip(biases(model), expected, strict=True):
        torch.testing.assert_close(moved, bias_E)
    loss.backward()
    for moved, bias_E in zip(biases(model), expected, strict=True):
        torch.testing.assert_close(moved, bias_E)
    model(**tiny_batch())
    assert any(not torch.equal(a, b) for a, b in zip(biases(model), expected, strict=True))


def test_the_bias_stays_in_eval_without_gradients_and_when_frozen() -> None:
    model = adapted("smora", bias_update_rate=0.1)
    before = biases(model)
    model(**tiny_batch())
    model.train()
    with torch.no_grad():
        model(**tiny_batch())
    recorder = find_recorder(model)
    assert recorder is not None
    with recorder.listening(frozen=True):
        model(**tiny_batch())
    assert all(torch.equal(a, b) for a, b in zip(biases(model), before, strict=True))


@CHECKPOINTING
def test_the_bias_moves_once_with_checkpointing(reentrant: bool) -> None:
    """Recomputing neither moves it again nor routes by its new value: the gradients are those without checkpointing."""
    plain = adapted("smora", bias_update_rate=0.3).train()
    model = checkpointed(adapted("smora", bias_update_rate=0.3), reentrant)
    for _ in range(3):
        expected, found = gradients(plain), gradients(model)
        assert expected.keys() == found.keys()
        for name, grad in expected.items():
            assert_close(name, found[name], grad, rtol=1e-5, atol=1e-7)
        for moved, bias_E in zip(biases(model), biases(plain), strict=True):
            assert torch.equal(moved, bias_E)


@CHECKPOINTING
@pytest.mark.parametrize("preset", ["sira", "smora"])
def test_a_forward_without_gradients_in_between_changes_nothing(preset: str, reentrant: bool) -> None:
    """A reference model's forward (DPO, KTO) between forward and backward, of a batch with another mask."""
    words: dict[str, Any] = {"expert_dropout": 0.0} if preset == "sira" else {"bias_update_rate": 0.3}
    plain = adapted(preset, **words).train()
    model = checkpointed(adapted(preset, **words), reentrant)
    expected = gradients(plain)
    other = tiny_batch(seed=1)
    other["attention_mask"] = other["attention_mask"].flip(0)
    loss = model(**tiny_batch()).loss
    with torch.no_grad():
        model(**other)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name, grad in expected.items():
        assert_close(name, found[name], grad, rtol=1e-5, atol=1e-7)


@CHECKPOINTING
def test_several_forwards_a_backward_with_checkpointing(reentrant: bool) -> None:
    """Refused where the second run could not repeat the first; exact where routing depends on the token alone."""
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]

    def both(model: Any) -> dict[str, Tensor]:
        model.zero_grad()
        sum(model(**batch).loss for batch in batches).backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected, found = both(adapted("mixlora").train()), both(checkpointed(adapted("mixlora"), reentrant))
    for name, grad in expected.items():
        assert_close(name, found[name], grad, rtol=1e-5, atol=1e-7)
    for preset in ("sira", "smora"):
        both(adapted(preset).train())
        with pytest.raises(MoeLoraError, match="several forwards before the backward pass"):
            both(checkpointed(adapted(preset), reentrant))


@CHECKPOINTING
def test_a_forward_whose_graph_was_dropped_is_no_trouble(reentrant: bool) -> None:
    model = checkpointed(adapted("sira", expert_dropout=0.0), reentrant)
    expected = gradients(adapted("sira", expert_dropout=0.0).train())
    model(**tiny_batch(seed=1))
    found = gradients(model)
    for name, grad in expected.items():
        assert_close(name, found[name], grad, rtol=1e-5, atol=1e-7)


def test_a_loss_that_nobody_adds_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("mixlora", balance_coef=0.1)
    with caplog.at_level(logging.WARNING, "moelora"):
        model(**tiny_batch())
        with torch.no_grad():
            model.train()(**tiny_batch())
        assert caplog.records == []
        for _ in range(3):
            model(**tiny_batch())
    assert len(caplog.records) == 1
    assert "MoeLoraTrainer" in caplog.text


@pytest.mark.parametrize("words", [{"balance_coef": 0.0}, {}], ids=["without-loss", "listening"])
def test_nothing_is_said_without_cause(words: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model = adapted("mixlora", **words).train()
    with caplog.at_level(logging.WARNING, "moelora"):
        if words:
            model(**tiny_batch())
        else:
            with record_routing(model):
                model(**tiny_batch())
    assert caplog.records == []
