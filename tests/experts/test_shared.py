"""Shared experts are always on, beside those that the router chooses (DeepSeekMoE)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.compose import drop_experts, switch_experts
from moelora.errors import ComposeError, ConfigError
from moelora.ops import reference
from tests.adapters import adapted, outputs, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients

SHARED: dict[str, Any] = {"experts": {"kind": "lora_with_shared", "num_shared": 2}}


@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_a_linear_equals_the_reference(compute: str) -> None:
    """`W x + s (sum of the shared ones + what the router makes of the rest)`, forward and every gradient."""
    model = adapted("sira", compute=compute, **SHARED)
    layer = tuner_layers(model)["model.layers.0.self_attn.q_proj"]
    a_ERD, b_EOR = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    weight_ED = layer.moelora_router["default"].weight
    assert (len(a_ERD), len(b_EOR), len(weight_ED)) == (6, 6, 4)
    x_TD = torch.randn(17, 36).requires_grad_()
    scaling = model.peft_config["default"].scaling

    def naive() -> Tensor:
        weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 2, renormalize=False)
        gates_TE = torch.zeros(17, 4).scatter(1, ids_TK, weights_TK)
        routed = reference.mixture_linear(x_TD, a_ERD[2:], b_EOR[2:], gates_TE, scaling)
        shared = [reference.mixture_linear(x_TD, a_ERD[s : s + 1], b_EOR[s : s + 1], None, scaling) for s in (0, 1)]
        return layer.base_layer(x_TD) + routed + shared[0] + shared[1]

    leaves = {"x": x_TD, "A": a_ERD, "B": b_EOR, "router": weight_ED}
    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


def test_one_shared_expert_alone_is_a_lora() -> None:
    """With routed ones that are still 0."""
    model = adapted("sira", experts={"kind": "lora_with_shared", "num_shared": 1})
    plain = adapted("lora", r=3, lora_alpha=4)
    others = tuner_layers(plain)
    for name, layer in tuner_layers(model).items():
        layer.moelora_B["default"].weight.data[1:] = 0
        for part in ("moelora_A", "moelora_B"):
            getattr(others[name], part)["default"].weight.data = getattr(layer, part)["default"].weight.data[:1].clone()
    torch.testing.assert_close(outputs(model), outputs(plain), rtol=1e-5, atol=1e-6)


def test_routing_and_switching_know_the_routed_ones_alone() -> None:
    model = adapted("sira", **SHARED)
    with record_routing(model) as recorder:
        before = outputs(model)
    assert {record.num_experts for record in recorder.records} == {4}
    switch_experts(model, {0: False, 1: False, 2: False})
    for layer in tuner_layers(model).values():
        layer.moelora_B["default"].weight.data[2:5] = 7.0
    found = outputs(model)
    assert (found - before).abs().max() > 1e-4
    assert found.abs().max() < 100  # of those that are off nothing is left
    for layer in tuner_layers(model).values():
        layer.moelora_B["default"].weight.data[0] = 0.0
    assert (outputs(model) - found).abs().max() > 1e-4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"num_shared": 0}, r"experts\.num_shared is 0; allowed: an integer of at least 1"),
        ({"num_shared": 1, "num_frozen": 1}, r"experts\.num_frozen is 1; allowed: 0 with shared experts"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(experts={"kind": "lora_with_shared", **words})


def test_what_does_not_go_together() -> None:
    with pytest.raises(ConfigError, match=r"placement is 'feed_forward'; allowed: a placement on linears with"):
        MoeLoraConfig.from_preset("mixlora", **SHARED)


def test_what_edits_experts_refuses_them(tmp_path: Path) -> None:
    adapted("sira", **SHARED).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ComposeError, match="'lora_with_shared' experts, some of which are null or always on"):
        drop_experts(str(tmp_path / "a"), str(tmp_path / "b"), experts=[0])


def test_they_are_counted() -> None:
    config = MoeLoraConfig.from_preset("sira", r=3, num_experts=4, top_k=2, target_modules=["q_proj"], **SHARED)
    assert config.num_trainable_parameters(tiny_model()) == 2 * (6 * 3 * (36 + 36) + 4 * 36)
