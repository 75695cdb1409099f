"""THOR: a block is the expert that was drawn, and in evaluation the mean of all."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora import record_routing
from moelora.layers.modules import dense_weight
from moelora.ops import reference
from tests.adapters import adapted, expert_tensors, outputs, tuner_layers
from tests.ops.compare import assert_close, gradients


@pytest.mark.parametrize("training", [False, True])
def test_a_block_equals_the_reference(training: bool) -> None:
    """Forward and every gradient; an expert that is not drawn has a gradient of 0."""
    model = adapted("thor").train(training)
    layer = tuner_layers(model)["model.layers.0.mlp"]
    experts, scaling = expert_tensors(layer), model.peft_config["default"].scaling
    x_TD = torch.randn(7, 36).requires_grad_()
    leaves = {"x": x_TD, **experts}

    def ours() -> Tensor:
        torch.manual_seed(2)
        return layer(x_TD[None])[0]

    torch.manual_seed(2)
    drawn = int(torch.randint(3, (1, 1)))
    gates_E = torch.tensor([float(e == drawn) for e in range(3)]) if training else torch.full((3,), 1 / 3)

    def naive() -> Tensor:
        loras = {role: (experts[f"A.{role}"], experts[f"B.{role}"], scaling) for role in ("gate", "up", "down")}
        linears = {role: dense_weight(layer.linear(role)) for role in loras}
        gates_TE, silu = gates_E.expand(7, 3), torch.nn.functional.silu
        return reference.mixture_feed_forward(x_TD, gates_TE, linears, loras, "gated", silu)

    found, expected = gradients(ours, leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert_close(name, found[name] / scale, tensor / scale, rtol=1e-4, atol=1e-6)
    others = [e for e in range(3) if e != drawn]
    assert bool(found["B.up"][others].any()) != training


def test_blocks_and_forwards_draw_for_themselves_and_evaluation_does_not_draw() -> None:
    model = adapted("thor").train()
    drawn = []
    for _ in range(30):
        with record_routing(model) as recorder:
            outputs(model)
        drawn.append([int(record.load_E().argmax()) for record in recorder.records])
    assert {one for one, _ in drawn} == {two for _, two in drawn} == {0, 1, 2}
    assert any(one != two for one, two in drawn)
    model.eval()
    assert torch.equal(outputs(model), outputs(model))
