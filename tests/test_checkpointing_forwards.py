"""Gradient checkpointing with several forwards before one backward pass, where routing depends on the forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.adapters import adapted, assert_close_gradients, assert_equal_tensors, gradients, router_biases
from tests.conftest import tiny_batch

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "capacity": ("sira", {"expert_dropout": 0.0, "capacity_factor": 0.5}),
    "capacity and dropout": ("sira", {"expert_dropout": 0.5, "capacity_factor": 0.5, "lora_dropout": 0.2}),
    "moving bias": ("smora", {"bias_update_rate": 0.3}),
    "tokens alone": ("mixlora", {"lora_dropout": 0.2}),
}
CHECKPOINTING = pytest.mark.parametrize("reentrant", [False, True], ids=["non-reentrant", "reentrant"])


def checkpointed(model: Any, reentrant: bool) -> Any:
    model.activation_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    return model.train()


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    """Each with another mask and of another length."""
    found = []
    for seed in range(count):
        batch = tiny_batch(seed=seed, length=11 + 3 * seed)
        if seed % 2:
            batch = {key: value.flip(0) for key, value in batch.items()}
        found.append(batch)
    return found


@CHECKPOINTING
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_several_forwards_before_one_backward(case: str, count: int, reentrant: bool) -> None:
    preset, words = CASES[case]
    plain, model = adapted(preset, **words).train(), checkpointed(adapted(preset, **words), reentrant)
    for step in range(2):
        torch.manual_seed(step)
        expected = gradients(plain, *batches(count))
        torch.manual_seed(step)
        assert_close_gradients(gradients(model, *batches(count)), expected)
        assert_equal_tensors(router_biases(model), router_biases(plain))


@CHECKPOINTING
@pytest.mark.parametrize("case", ["capacity", "moving bias"])
def test_the_same_batch_twice(case: str, reentrant: bool) -> None:
    """What tells the two runs of a layer apart is not their input."""
    preset, words = CASES[case]
    batch = tiny_batch()
    other = {**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}
    plain, model = adapted(preset, **words).train(), checkpointed(adapted(preset, **words), reentrant)
    assert_close_gradients(gradients(model, batch, other, batch), gradients(plain, batch, other, batch))


@CHECKPOINTING
def test_an_evaluation_between_forward_and_backward(reentrant: bool) -> None:
    """With gradients off and on, of another batch, in the other mode."""
    preset, words = CASES["capacity"]
    plain, model = adapted(preset, **words).train(), checkpointed(adapted(preset, **words), reentrant)
    loss = model(**tiny_batch()).loss
    model.eval()
    with torch.no_grad():
        model(**tiny_batch(seed=1, length=20))
    model(**tiny_batch(seed=2, length=17))
    model.train()
    loss.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    assert_close_gradients(found, gradients(plain))
