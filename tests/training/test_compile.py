"""torch.compile: one graph without breaks, no recompilation from step to step, the balance losses inside."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import batch_facts, record_routing
from moelora.balance.losses import balance_losses
from moelora.balance.switch import SwitchBalance
from moelora.balance.z_loss import ZLoss
from tests.adapters import router_biases, shake, small_config
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close
from tests.training.runs import Run, assert_same_gradients, toy_rows, train

WORDS: dict[str, dict[str, Any]] = {
    "mixlora": {"balance_coef": 1.0},
    "mos": {"r": 2},
    "smora": {"balance_coef": 1.0, "bias_update_rate": 0.1, "target_modules": ["q_proj"]},
}

BOTH = (SwitchBalance(), ZLoss())


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()


def one_layer(preset: str) -> Any:
    """A model small enough to be traced in seconds."""
    model = get_peft_model(tiny_model(num_hidden_layers=1), small_config(preset, **WORDS.get(preset, {})))
    shake(model)
    return model


def recorded_step(model: Any, forward: Any) -> dict[str, Tensor]:
    model.zero_grad()
    with record_routing(model) as recorder:
        loss = forward(**tiny_batch()).loss
        balance, z = balance_losses(recorder.records, BOTH)
    (loss + balance + 0.1 * z).backward()
    values = {"loss": loss.detach(), "balance": balance.detach(), "z": z.detach()}
    return values | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("preset", "backend"), [("mixlora", "aot_eager"), ("smora", "eager")])
def test_training_is_one_graph_without_recompilation(preset: str, backend: str) -> None:
    model, plain = one_layer(preset).train(), one_layer(preset).train()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    graphs = []
    for _ in range(3):
        found, expected = recorded_step(model, compiled), recorded_step(plain, plain)
        assert_same_gradients(found, expected)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs == [1, 1, 1]
    for name, expected_bias in router_biases(plain).items():
        assert_close(name, router_biases(model)[name], expected_bias, rtol=1e-6, atol=1e-7)


def test_inference_is_one_graph() -> None:
    model = one_layer("mixlora").eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(**tiny_batch()).logits, model(**tiny_batch()).logits)


@pytest.mark.parametrize("preset", ["poly", "mos"])
def test_methods_that_look_things_up_are_one_graph(preset: str) -> None:
    model = one_layer(preset).eval()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    inputs = tiny_batch()
    with torch.no_grad(), batch_facts(task_ids=torch.arange(len(inputs["input_ids"])) % 2):
        torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits)


def test_a_plain_trainer_is_warned_while_compiling(caplog: pytest.LogCaptureFixture) -> None:
    model = one_layer("mixlora").train()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with caplog.at_level(logging.WARNING, "moelora"):
        compiled(**tiny_batch())
        compiled(**tiny_batch())
    assert [record.name for record in caplog.records].count("moelora.routing.run") == 1


def assert_compiles(backend: str, **cut: Any) -> None:
    def step(**settings: Any) -> Run:
        return train(one_layer("mixlora"), toy_rows(), **cut, **settings)

    found, expected = step(torch_compile=True, torch_compile_backend=backend), step()
    for key in ("loss", "balance_loss", "z_loss"):
        assert found.logs[0][key] == pytest.approx(expected.logs[0][key], rel=1e-5)
    assert_same_gradients(found.gradients[0], expected.gradients[0])


IGNORED = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@IGNORED
def test_the_trainer_compiles() -> None:
    """`torch_compile=True`, accumulating: counting and training are a graph each, and the step is the same."""
    assert_compiles("aot_eager", batch=2, accumulate=2)


@pytest.mark.slow
@IGNORED
def test_the_trainer_compiles_to_machine_code() -> None:
    assert_compiles("inductor", batch=4)
