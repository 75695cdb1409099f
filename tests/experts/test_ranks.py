"""Experts of a rank each.

Shape suffixes: E experts, R rank of one expert.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.compose import drop_experts
from moelora.errors import ComposeError, ConfigError
from moelora.ops import reference
from tests.adapters import adapted, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients

RANKS = [1, 2, 3, 3]
WORDS: dict[str, Any] = {"experts": {"kind": "lora_ranks", "ranks": RANKS}}


@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_a_linear_equals_the_reference(compute: str) -> None:
    """Each expert by itself with its own rows, forward and every gradient."""
    model = adapted("sira", compute=compute, **WORDS)
    layer = tuner_layers(model)["model.layers.0.mlp.down_proj"]
    a_MD, b_MO = layer.moelora_A["default"].weight, layer.moelora_B["default"].weight
    weight_ED = layer.moelora_router["default"].weight
    assert (a_MD.shape, b_MO.shape) == ((9, 52), (9, 36))
    x_TD = torch.randn(17, 52).requires_grad_()
    scaling = model.peft_config["default"].scaling

    def naive() -> Tensor:
        weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 2, renormalize=False)
        gates_TE = torch.zeros(17, 4).scatter(1, ids_TK, weights_TK)
        y, start = layer.base_layer(x_TD), 0
        for e, rank in enumerate(RANKS):
            a_RD, b_OR = a_MD[start : start + rank], b_MO[start : start + rank].t()
            y = y + reference.mixture_linear(x_TD, a_RD[None], b_OR[None], gates_TE[:, e : e + 1], scaling)
            start += rank
        return y

    leaves = {"x": x_TD, "A": a_MD, "B": b_MO, "router": weight_ED}
    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


def test_equal_ranks_are_lora_experts() -> None:
    ranked = adapted("sira", experts={"kind": "lora_ranks", "ranks": [3] * 4})
    plain = adapted("sira")
    for name, layer in tuner_layers(plain).items():
        other = tuner_layers(ranked)[name]
        layer.moelora_A["default"].weight.data = other.moelora_A["default"].weight.data.view(4, 3, -1).clone()
        b_ERO = other.moelora_B["default"].weight.data.view(4, 3, -1)
        layer.moelora_B["default"].weight.data = b_ERO.transpose(1, 2).contiguous()
        layer.moelora_router["default"].weight.data = other.moelora_router["default"].weight.data.clone()
        x = torch.randn(5, layer.in_features)
        torch.testing.assert_close(layer(x), other(x), rtol=1e-5, atol=1e-6)


def test_what_is_not_there_is_not_counted() -> None:
    config = MoeLoraConfig.from_preset("sira", r=3, num_experts=4, top_k=2, target_modules=["q_proj"], **WORDS)
    assert config.num_trainable_parameters(tiny_model()) == 2 * (9 * (36 + 36) + 4 * 36)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"ranks": [1, 2, 3]}, r"experts\.ranks is \[1, 2, 3\]; allowed: 4 integers of 1 to r \(3\)"),
        ({"ranks": [1, 2, 3, 4]}, r"experts\.ranks is \[1, 2, 3, 4\]"),
        ({"ranks": [0, 2, 3, 3]}, r"experts\.ranks is \[0, 2, 3, 3\]"),
        ({"ranks": RANKS, "num_frozen": 1}, r"experts\.num_frozen is 1; allowed: 0 with ranks"),
        ({"ranks": RANKS, "per_layer": [2, 4]}, r"experts\.per_layer is \[2, 4\]; allowed: None with ranks"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MoeLoraConfig(experts={"kind": "lora_ranks", "num_experts": 4, "r": 3, **words})


def test_what_does_not_go_together(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"placement\.unrouted_modules is 'rest'; allowed: None with 'lora_ranks'"):
        MoeLoraConfig.from_preset("mixlora", num_experts=4, **WORDS)
    adapted("sira", **WORDS).save_pretrained(str(tmp_path / "a"))
    with pytest.raises(ComposeError, match="'lora_ranks' experts; allowed: experts that are LoRAs"):
        drop_experts(str(tmp_path / "a"), str(tmp_path / "b"), experts=[0])
