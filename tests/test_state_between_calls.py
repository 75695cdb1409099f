"""Nothing is kept from one forward to the next, and nothing is shared between threads or models."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import pytest
import torch
from torch import Tensor, nn

from moelora import record_routing
from tests.adapters import (
    PRESETS,
    ROUTED,
    adapted,
    assert_close_gradients,
    assert_equal_tensors,
    gradients,
    outputs,
    router_biases,
)
from tests.conftest import tiny_batch

T = TypeVar("T")
# A capacity that drops choices, and no draws.
TIGHT: dict[str, Any] = {"capacity_factor": 0.5, "expert_dropout": 0.0, "lora_alpha": 12}
UNPADDED = torch.ones(3, 11, dtype=torch.long)


def backbone(model: Any) -> nn.Module:
    """What gives the hidden states, below PEFT's wrapper and the head."""
    inner: nn.Module = model.get_base_model().base_model
    return inner


def tokens(seed: int = 9) -> Tensor:
    """Three rows without padding."""
    return torch.randint(3, 97, (3, 11), generator=torch.Generator().manual_seed(seed))


# --- the backbone, called below the wrapper ---


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_backbone_does_not_read_the_padding_of_an_earlier_batch(name: str) -> None:
    model, fresh = (adapted("sira", name, capacity_in_eval=True, **TIGHT) for _ in range(2))
    expected = backbone(fresh)(input_ids=tokens()).last_hidden_state
    model(**tiny_batch(name))
    assert torch.equal(backbone(model)(input_ids=tokens()).last_hidden_state, expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
def test_the_backbone_reads_its_own_mask(name: str) -> None:
    model = adapted("sira", name, capacity_in_eval=True, **TIGHT)
    batch = tiny_batch(name)
    inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True).hidden_states[-1]
        model(input_ids=tokens(), attention_mask=UNPADDED)
        alone = backbone(model)(**inputs).last_hidden_state
    valid = inputs["attention_mask"].bool()
    assert torch.equal(alone[valid], whole[valid])


def test_gradients_through_the_backbone_are_those_of_the_model() -> None:
    def found(way: Callable[[Any], Tensor]) -> dict[str, Tensor]:
        model = adapted("sira", **TIGHT).train()
        gradients(model, tiny_batch(seed=5))
        model.zero_grad()
        way(model).pow(2).mean().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    inputs = {"input_ids": tokens(), "attention_mask": UNPADDED}
    assert_close_gradients(
        found(lambda model: backbone(model)(**inputs).last_hidden_state),
        found(lambda model: model(**inputs, output_hidden_states=True).hidden_states[-1]),
    )


@pytest.mark.parametrize("preset", ROUTED)
def test_records_of_the_backbone(preset: str) -> None:
    model = adapted(preset)
    inputs = {key: value for key, value in tiny_batch().items() if key != "labels"}
    with record_routing(model) as whole:
        model(**inputs)
    with record_routing(model) as alone:
        backbone(model)(**inputs)
    assert [record.layer for record in alone.records] == [record.layer for record in whole.records]
    assert whole.records
    for found, expected in zip(alone.records, whole.records, strict=True):
        assert torch.equal(found.valid_T, expected.valid_T)
        assert torch.equal(found.load_E(), expected.load_E())


def test_the_bias_moves_with_the_backbone_as_with_the_model() -> None:
    model, other = (adapted("smora", bias_update_rate=0.1).train() for _ in range(2))
    before = router_biases(model)
    inputs = {key: value for key, value in tiny_batch().items() if key != "labels"}
    model(**inputs)
    backbone(other)(**inputs)
    expected = router_biases(model)
    assert any(not torch.equal(expected[name], old) for name, old in before.items())
    assert_equal_tensors(router_biases(other), expected)


# --- threads ---


def in_threads(*calls: Callable[[], T]) -> list[T]:
    """The results of calls that run at the same time."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result(timeout=60) for future in [pool.submit(call) for call in calls]]


def meet_at(module: nn.Module) -> Any:
    """Let two threads wait for each other before `module` runs: each has passed what comes before it."""
    barrier = threading.Barrier(2)

    def wait(*_: Any) -> None:
        barrier.wait(timeout=30)

    return module.register_forward_pre_hook(wait)


@pytest.fixture
def _quick_switching() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(interval)


def test_two_threads_in_a_split_block() -> None:
    """BERT's feed-forward block is in two modules; both threads are in the first before one enters the second."""
    model = adapted("mixlora", "bert")
    batches = [tiny_batch("bert", seed=seed) for seed in (1, 2)]
    expected = [outputs(model, "bert", **batch) for batch in batches]
    handle = meet_at(model.get_base_model().bert.encoder.layer[0].output)
    found = in_threads(*(lambda batch=batch: outputs(model, "bert", **batch) for batch in batches))
    handle.remove()
    for logits, wanted in zip(found, expected, strict=True):
        assert torch.equal(logits, wanted)


@pytest.mark.parametrize("grad", [False, True])
def test_two_threads_with_unlike_padding(grad: bool) -> None:
    """Both forwards have begun, each with its own mask, before one reaches the first mixture."""
    model = adapted("sira", capacity_in_eval=True, **TIGHT)
    full = {"input_ids": tokens(), "attention_mask": UNPADDED}
    padded = {key: value for key, value in tiny_batch().items() if key != "labels"}

    def logits(batch: dict[str, Tensor]) -> Tensor:
        with torch.set_grad_enabled(grad):
            result: Tensor = model(**batch).logits.detach()
        return result

    expected = [logits(full), logits(padded)]
    handle = meet_at(model.get_base_model().model.layers[0])
    found = in_threads(lambda: logits(full), lambda: logits(padded))
    handle.remove()
    for one, wanted in zip(found, expected, strict=True):
        assert torch.equal(one, wanted)


@pytest.mark.usefixtures("_quick_switching")
@pytest.mark.parametrize("preset", ["mixlora", "sira"])
@pytest.mark.parametrize("name", ["llama", "bert", "t5"])
def test_many_forwards_in_two_threads(preset: str, name: str) -> None:
    model = adapted(preset, name)
    batches = [tiny_batch(name, seed=seed, length=11 + seed) for seed in range(4)]
    expected = [outputs(model, name, **batch) for batch in batches]

    def run(order: list[int]) -> list[tuple[int, Tensor]]:
        return [(index, outputs(model, name, **batches[index])) for index in order]

    for results in in_threads(lambda: run([0, 1, 2, 3] * 3), lambda: run([3, 2, 1, 0] * 3)):
        for index, logits in results:
            assert torch.equal(logits, expected[index])


def test_a_listener_does_not_hear_another_thread() -> None:
    model = adapted("mixlora")
    with record_routing(model) as recorder:
        in_threads(lambda: outputs(model))
        assert recorder.records == []
        outputs(model)
        assert len(recorder.records) == 2


def test_each_thread_hears_itself() -> None:
    model = adapted("sira", target_modules=["q_proj"])
    batches = [tiny_batch(seed=seed) for seed in (1, 2)]

    def loads(batch: dict[str, Tensor]) -> list[Tensor]:
        with record_routing(model) as recorder:
            outputs(model, "llama", **batch)
        return [record.load_E() for record in recorder.records]

    expected = [loads(batch) for batch in batches]
    handle = meet_at(model.get_base_model().model.layers[1])
    found = in_threads(*(lambda batch=batch: loads(batch) for batch in batches))
    handle.remove()
    for mine, wanted in zip(found, expected, strict=True):
        assert len(mine) == len(wanted) == 2
        for load_E, wanted_E in zip(mine, wanted, strict=True):
            assert torch.equal(load_E, wanted_E)


# --- inference mode ---


@pytest.mark.parametrize("where", ["this model", "another model"])
@pytest.mark.parametrize("preset", PRESETS)
def test_training_after_inference_mode(preset: str, where: str) -> None:
    """The batch in inference mode is larger than any before, so that scratch memory, if there is any, is made there."""
    expected = gradients(adapted(preset, expert_dropout=0.0) if preset == "sira" else adapted(preset))
    model = adapted(preset, expert_dropout=0.0) if preset == "sira" else adapted(preset)
    served = model if where == "this model" else adapted(preset, seed=3)
    with torch.inference_mode():
        served(**tiny_batch(batch_size=7, length=60))
    with torch.no_grad():
        model(**tiny_batch())
    assert_close_gradients(gradients(model), expected)


@pytest.mark.parametrize("preset", PRESETS)
def test_inference_mode_after_training_gives_the_same_logits(preset: str) -> None:
    model = adapted(preset)
    expected = outputs(model)
    gradients(model)
    with torch.inference_mode():
        assert torch.equal(model(**tiny_batch()).logits, expected)
