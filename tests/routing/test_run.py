"""A run of a model: what opens and ends it, the biases that move with it, what it repeats, the facts it is given."""

from __future__ import annotations

import copy
import logging
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora import batch_facts, record_routing
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.routing.run import current_place, find_hooks
from tests.adapters import (
    ROUTED,
    adapted,
    assert_close_gradients,
    assert_equal_tensors,
    gradients,
    outputs,
    router_biases,
)
from tests.conftest import tiny_batch

CHECKPOINTING = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])
# No draws, which a comparison could not repeat; and biases that move far enough to route otherwise.
WORDS: dict[str, dict[str, Any]] = {"sira": {"expert_dropout": 0.0}, "smora": {"bias_update_rate": 0.3}}


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def task_ids_read(model: Any) -> list[list[int]]:
    """A list that gets the task of each token, whenever the first layer runs."""
    seen: list[list[int]] = []

    def read(_: nn.Module, args: tuple[Tensor, ...]) -> None:
        place = current_place()
        assert place is not None
        seen.append(place.batch.tokens(args[0]).fact_T("task_ids").tolist())

    model.get_base_model().model.layers[0].mlp.register_forward_pre_hook(read)
    return seen


# --- opening and closing ---


def test_a_failed_forward_closes_the_run() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    before = router_biases(model)
    with record_routing(model) as recorder:
        with pytest.raises(RuntimeError, match="out of memory"):
            with_failure(model, lambda: model(**tiny_batch()))
        assert current_place() is None
        recorder.clear()
        model.base_model.model.model.layers[0].mlp.gate_proj(torch.randn(1, 5, 36))
        assert recorder.records == []
    assert_equal_tensors(router_biases(model), before)


def with_failure(model: Any, call: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory")

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(fail)
    try:
        call()
    finally:
        handle.remove()


def test_a_deep_copy_has_runs_of_its_own() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
        recorder.clear()
        twin = copy.deepcopy(model)
        with record_routing(twin) as twins:
            twin(**tiny_batch())
        assert len(twins.records) == 14
        assert recorder.records == []
    own, original = find_hooks(twin), find_hooks(model)
    assert own is not None
    assert original is not None
    assert own is not original
    inside = {id(module) for module in twin.modules()}
    assert len(own.layers) == len(original.layers) == 14
    assert all(id(layer) in inside for layer in own.layers)
    assert not any(id(layer) in inside for layer in original.layers)


def test_a_deep_copy_trains_on_as_the_original() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    gradients(model)
    twin = copy.deepcopy(model)
    for _ in range(2):
        expected, found = gradients(model), gradients(twin)
        assert_equal_tensors(found, expected)
    assert_equal_tensors(router_biases(twin), router_biases(model))


def test_pickling_keeps_the_model_and_forgets_listeners() -> None:
    model = adapted("mixlora")
    hooks = find_hooks(model)
    assert hooks is not None
    assert any(layer.expects_balance_loss() for layer in hooks.layers)
    with record_routing(model) as recorder:
        model(**tiny_batch())
        restored = pickle.loads(pickle.dumps(model))
        recorder.clear()
        assert torch.equal(outputs(restored), outputs(model))
        assert len(recorder.records) == 2, "the copy is heard too"
    again = find_hooks(restored)
    assert again is not None
    assert any(layer.expects_balance_loss() for layer in again.layers)
    with record_routing(restored) as listener:
        assert listener.records == []
        outputs(restored)
        assert len(listener.records) == 2


def test_unloading_removes_every_hook() -> None:
    for name in ("llama", "t5"):
        model = adapted("sira", name)
        base = model.unload()
        assert find_hooks(base) is None
        for module in base.modules():
            assert not module._forward_hooks
            assert not module._forward_pre_hooks


# --- biases ---


def test_the_bias_moves_once_a_training_forward() -> None:
    model = adapted("smora", bias_update_rate=0.1).train()
    before = router_biases(model)
    with record_routing(model) as recorder:
        loss = model(**tiny_batch()).loss
    assert len(before) == len(recorder.records) == 14
    expected = {}
    for (name, bias_E), record in zip(before.items(), recorder.records, strict=True):
        assert f"{record.layer}.moelora_router" in name
        assert record.routing.ids_TK is not None
        expected[name] = reference.bias_update(bias_E, record.routing.ids_TK[record.valid_T], 0.1)
    for name, moved in router_biases(model).items():
        torch.testing.assert_close(moved, expected[name])
    loss.backward()
    for name, moved in router_biases(model).items():
        torch.testing.assert_close(moved, expected[name])
    model(**tiny_batch())
    assert any(not torch.equal(moved, expected[name]) for name, moved in router_biases(model).items())


def test_the_bias_stays_in_eval_without_gradients_and_when_frozen() -> None:
    model = adapted("smora", bias_update_rate=0.1)
    before = router_biases(model)
    model(**tiny_batch())
    model.train()
    with torch.no_grad():
        model(**tiny_batch())
    with torch.inference_mode():
        model(**tiny_batch())
    model.enable_input_require_grads()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    model(**tiny_batch())
    assert_equal_tensors(router_biases(model), before)


@CHECKPOINTING
def test_the_bias_moves_once_with_checkpointing(reentrant: bool) -> None:
    """Recomputing neither moves it again nor routes by its new value: the gradients are those without checkpointing."""
    plain = adapted("smora", bias_update_rate=0.3).train()
    model = checkpointed(adapted("smora", bias_update_rate=0.3), reentrant)
    before = router_biases(model)
    for _ in range(3):
        assert_close_gradients(gradients(model), gradients(plain))
        assert_equal_tensors(router_biases(model), router_biases(plain))
    assert any(not torch.equal(moved, before[name]) for name, moved in router_biases(model).items())


# --- repeating ---


@CHECKPOINTING
@pytest.mark.parametrize("preset", ["sira", "smora"])
def test_a_forward_without_gradients_in_between_changes_nothing(preset: str, reentrant: bool) -> None:
    """A reference model's forward (DPO, KTO) between forward and backward, of a batch with another mask."""
    plain = adapted(preset, **WORDS[preset]).train()
    model = checkpointed(adapted(preset, **WORDS[preset]), reentrant)
    expected = gradients(plain)
    other = tiny_batch(seed=1)
    other["attention_mask"] = other["attention_mask"].flip(0)
    loss = model(**tiny_batch()).loss
    with torch.no_grad():
        model(**other)
    loss.backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert_close_gradients(found, expected)


@CHECKPOINTING
@pytest.mark.parametrize("preset", ROUTED)
def test_several_forwards_a_backward_with_checkpointing(preset: str, reentrant: bool) -> None:
    """Each is repeated with its own mask and bias, in whichever order the backward pass comes to them."""
    batches = [tiny_batch(seed=seed) for seed in (0, 1)]
    batches[1]["attention_mask"] = batches[1]["attention_mask"].flip(0)
    words = WORDS.get(preset, {})
    expected = gradients(adapted(preset, **words).train(), *batches)
    assert_close_gradients(gradients(checkpointed(adapted(preset, **words), reentrant), *batches), expected)


@CHECKPOINTING
def test_a_forward_whose_graph_was_dropped_is_no_trouble(reentrant: bool) -> None:
    model = checkpointed(adapted("sira", expert_dropout=0.0), reentrant)
    expected = gradients(adapted("sira", expert_dropout=0.0).train())
    model(**tiny_batch(seed=1))
    assert_close_gradients(gradients(model), expected)


# --- a loss that nobody adds ---


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


# --- facts ---


def test_facts_reach_the_layers_and_are_gone_afterwards() -> None:
    model = adapted("mixlora")
    seen = task_ids_read(model)
    with batch_facts(task_ids=[7, 4, 9]):
        outputs(model)
    outputs(model.base_model, task_ids=torch.tensor([1, 2, 3]))
    assert seen == [[7] * 11 + [4] * 11 + [9] * 11, [1] * 11 + [2] * 11 + [3] * 11]
    with pytest.raises(ConfigError, match="task_ids, which the batch does not have"):
        outputs(model)


def test_inner_facts_replace_outer_ones() -> None:
    model = adapted("mixlora")
    seen = task_ids_read(model)
    with batch_facts(task_ids=[1, 1, 1]):
        with batch_facts(task_ids=[2, 2, 2]):
            outputs(model)
        with batch_facts(instance_embedding=torch.zeros(3, 5)):
            outputs(model)
    assert seen == [[2] * 33, [1] * 33]


def test_another_name_is_no_fact() -> None:
    message = r"unknown fact\(s\) \['task_id'\].*allowed: task_ids, instance_embedding"
    with pytest.raises(ConfigError, match=message), batch_facts(task_id=[1]):
        pass


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
def test_repeated_layers_have_the_facts_of_their_forward(reentrant: bool | None) -> None:
    model = adapted("mixlora").train()
    if reentrant is not None:
        checkpointed(model, reentrant)
    seen = task_ids_read(model)
    with batch_facts(task_ids=[7, 4, 9]):
        loss = model(**tiny_batch()).loss
    with batch_facts(task_ids=[0, 0, 0]):
        loss.backward()
    assert len(seen) == (1 if reentrant is None else 2)
    assert all(found == [7] * 11 + [4] * 11 + [9] * 11 for found in seen)


@pytest.mark.parametrize("way", ["argument", "context"])
def test_beams_have_the_facts_of_their_prompt(way: str) -> None:
    model = adapted("mixlora")
    seen = task_ids_read(model)
    batch = tiny_batch(batch_size=2)
    settings = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": 2}
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    if way == "argument":
        model.generate(**inputs, **settings, task_ids=torch.tensor([7, 4]))
    else:
        with batch_facts(task_ids=[7, 4]):
            model.generate(**inputs, **settings)
    assert [len(found) // 2 for found in seen[1:]] == [2, 2]
    for found in seen:
        assert found == [7] * (len(found) // 2) + [4] * (len(found) // 2)
