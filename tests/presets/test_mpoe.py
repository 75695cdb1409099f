"""MPOE: an expert's matrices are products of its own tensors with one that all share, whose gradient is masked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.experts.mpo import split
from moelora.layers.modules import dense_weight
from moelora.ops import reference, reference_adapters
from tests.adapters import adapted, expert_tensors, small_config, stacks, tuner_layers
from tests.conftest import tiny_model
from tests.ops.compare import assert_close, gradients

BLOCK = "model.layers.0.mlp"
ROLES = ("gate", "up", "down")


def matrices(tensors: dict[str, Tensor], role: str) -> tuple[Tensor, Tensor]:
    """A [E, R, in] and B [E, out, R] of a linear, expert by expert."""
    found = []
    for factor in "AB":
        left, central, right = (tensors[f"{factor}_{part}.{role}"] for part in ("left", "central", "right"))
        found.append(
            torch.stack([reference_adapters.matrix_product(left[e], central, right[e]) for e in range(len(left))])
        )
    return found[0], found[1].transpose(1, 2)


def test_a_block_equals_the_reference() -> None:
    """Forward and every gradient, without a mask."""
    model = adapted("mpoe", gradient_mask=0.0).train()
    layer = tuner_layers(model)[BLOCK]
    experts, scaling = expert_tensors(layer), model.peft_config["default"].scaling
    weight_ED = layer.moelora_router["default"].get_parameter("weight")
    x_TD = torch.randn(6, 36).requires_grad_()
    leaves = {"x": x_TD, **experts, "router": weight_ED}

    def naive() -> Tensor:
        weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 2, renormalize=True)
        gates_TE = torch.zeros(6, 4).scatter(1, ids_TK, weights_TK)
        loras = {role: (*matrices(experts, role), scaling) for role in ROLES}
        linears = {role: dense_weight(layer.linear(role)) for role in ROLES}
        silu = torch.nn.functional.silu
        return reference.mixture_feed_forward(x_TD, gates_TE, linears, loras, "gated", silu)

    found, expected = gradients(lambda: layer(x_TD[None])[0], leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert_close(name, found[name] / scale, tensor / scale, rtol=1e-4, atol=1e-6)


def test_the_shapes_and_the_sharing() -> None:
    """36 features are 3 x 4 x 3 and 52 are 2 x 13 x 2; one central tensor for all experts."""
    layer = tuner_layers(adapted("mpoe"))[BLOCK]
    shapes = {name: list(tensor.shape) for name, tensor in expert_tensors(layer).items() if name.endswith(".up")}
    assert shapes == {
        "A_left.up": [4, 3, 3],
        "A_central.up": [3, 3, 4, 3],
        "A_right.up": [4, 3, 3],
        "B_left.up": [4, 2, 2],
        "B_central.up": [2, 3, 13, 2],
        "B_right.up": [4, 2, 2],
    }
    a_ERD, b_EOR = stacks(layer, "up")
    assert (a_ERD.shape, b_EOR.shape) == ((4, 3, 36), (4, 52, 3))
    assert all(not torch.allclose(a_ERD[0], a_ERD[e]) for e in (1, 2, 3))


@pytest.mark.parametrize(
    ("n", "ends", "parts"),
    [(576, 8, (8, 9, 8)), (1536, 8, (8, 24, 8)), (37, 8, (1, 37, 1)), (6, 8, (6, 1, 1)), (36, 1, (1, 36, 1))],
)
def test_how_features_are_split(n: int, ends: int, parts: tuple[int, int, int]) -> None:
    assert split(n, ends) == parts


def central_gradients(model: Any, draws: int) -> Tensor:
    """Gradients of a central tensor in several forwards, [draws, ...]."""
    layer = tuner_layers(model)[BLOCK]
    found = []
    for _ in range(draws):
        model.zero_grad()
        layer(torch.randn(1, 9, 36, generator=torch.Generator().manual_seed(3))).sum().backward()
        found.append(layer.moelora_A_central["default"].get_parameter("up").grad.clone())
    return torch.stack(found)


def test_the_mask_leaves_out_gradients_of_the_centre_alone_and_in_training_alone() -> None:
    plain = central_gradients(adapted("mpoe", gradient_mask=0.75).eval(), 1)[0]
    masked = central_gradients(adapted("mpoe", gradient_mask=0.75).train(), 40)
    kept = masked != 0
    assert 0.2 < float(kept.float().mean()) < 0.3
    assert kept.any(0).all()
    torch.testing.assert_close(masked[kept], plain.expand_as(masked)[kept], rtol=1e-5, atol=1e-7)
    models = {share: adapted("mpoe", gradient_mask=share).train() for share in (0.0, 0.75)}
    x = torch.randn(1, 9, 36)
    layers = {share: tuner_layers(model)[BLOCK] for share, model in models.items()}
    outputs = {share: layer(x) for share, layer in layers.items()}
    assert torch.equal(outputs[0.0], outputs[0.75])
    for output in outputs.values():
        output.sum().backward()
    for name, tensor in expert_tensors(layers[0.0]).items():
        other = expert_tensors(layers[0.75])[name]
        assert tensor.grad is not None
        assert other.grad is not None
        assert torch.allclose(tensor.grad, other.grad, rtol=1e-5, atol=1e-6) == ("central" not in name), name


def test_experts_share_most_of_their_parameters() -> None:
    """The next expert costs far less than a LoRA does, routers apart."""
    model = tiny_model(hidden_size=64, intermediate_size=128, num_attention_heads=4, num_key_value_heads=2)
    words = {"target_modules": ["up_proj"], "r": 8, "router_init_std": 0.02}

    def count(preset: str, num_experts: int, **more: Any) -> int:
        config = MoeLoraConfig.from_preset(preset, num_experts=num_experts, **words, **more)
        return config.num_trainable_parameters(model) - 2 * 64 * num_experts

    mpo, lora = ([count(preset, E) for E in (4, 5)] for preset in ("mpoe", "mixlora"))
    assert mpo[1] - mpo[0] == 2 * 4 * 64
    assert lora[1] - lora[0] == 2 * 8 * (64 + 128)


def test_bad_values() -> None:
    with pytest.raises(ConfigError, match="gradient_mask is 1; allowed: 0 <= gradient_mask < 1"):
        MoeLoraConfig.from_preset("mpoe", gradient_mask=1)
    with pytest.raises(ConfigError, match="ends is 0; allowed: an integer of at least 1"):
        small_config("mpoe", ends=0)
    assert get_peft_model(tiny_model("gpt2"), small_config("mpoe", "gpt2")) is not None
