"""What a call that was cut short, or repeated by somebody else, leaves behind: nothing."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moelora import MoeLoraError, MoeLoraTrainer, record_routing
from moelora.routing.run import current_place
from tests.adapters import adapted, assert_close_gradients, gradients, outputs, router_biases
from tests.conftest import tiny_batch
from tests.training.runs import toy_rows, train


def interrupt(model: Any, call: Any) -> None:
    """Run `call` and press Ctrl-C in the second layer."""

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.base_model.model.model.layers[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        call()
    handle.remove()


def test_an_interrupted_forward_leaves_nothing() -> None:
    """torch calls no hooks after a KeyboardInterrupt, and a notebook goes on with the same model."""
    model = adapted("smora", bias_update_rate=0.1).train()
    interrupt(model, lambda: model(**tiny_batch()))
    before = router_biases(model)
    with record_routing(model) as recorder:
        model(**tiny_batch())
    assert len(recorder.records) == 14
    assert any(not torch.equal(bias_E, before[name]) for name, bias_E in router_biases(model).items())
    assert current_place() is None


def test_an_interrupted_forward_leaves_no_mask() -> None:
    model = adapted("sira", capacity_in_eval=True, capacity_factor=0.5)
    expected = outputs(model, attention_mask=None)
    interrupt(model, lambda: model(**tiny_batch()))
    assert torch.equal(outputs(model, attention_mask=None), expected)


def whole_model_checkpointed(model: Any) -> dict[str, torch.Tensor]:
    """Gradients where the user checkpoints the whole model."""
    batch = tiny_batch()
    model.zero_grad()
    call = lambda ids, mask, labels: model(input_ids=ids, attention_mask=mask, labels=labels).loss  # noqa: E731
    checkpoint(call, batch["input_ids"], batch["attention_mask"], batch["labels"], use_reentrant=False).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_whole_model_that_is_checkpointed_is_recorded_once() -> None:
    model = adapted("mixlora").train()
    expected = gradients(model)
    with record_routing(model) as recorder:
        found = whole_model_checkpointed(model)
    assert len(recorder.records) == 2
    assert_close_gradients(found, expected)


def test_a_moving_bias_cannot_be_repeated_by_the_user() -> None:
    model = adapted("smora", bias_update_rate=0.2).train()
    with pytest.raises(MoeLoraError, match="run again in the backward pass by other means"):
        whole_model_checkpointed(model)


class OwnLoss(MoeLoraTrainer):
    """A trainer whose loss passes the mixin's by."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        outputs = model(**inputs)
        return (outputs.loss, outputs) if return_outputs else outputs.loss


def test_a_loss_that_passes_the_trainer_by_is_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "moelora"):
        train(adapted("mixlora", balance_coef=1.0), toy_rows(), OwnLoss, max_steps=2)
    assert [record.name for record in caplog.records] == ["moelora.training.trainer"]
    assert "OwnLoss has a compute_loss of its own" in caplog.text
