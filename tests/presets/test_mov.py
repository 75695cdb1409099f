"""MoV: each site is its equation, and one vector is PEFT's (IA)^3."""

from __future__ import annotations

import pytest
import torch
from peft import IA3Config, get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from moelora.ops import reference
from tests.adapters import adapted, outputs, shake, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients


@pytest.mark.parametrize("site", ["self_attn.k_proj", "self_attn.v_proj", "mlp.down_proj"])
def test_a_layer_equals_the_reference(site: str) -> None:
    """Forward and the gradient of the input, the vectors and the router."""
    layer = tuner_layers(adapted("mov"))[f"model.layers.1.{site}"]
    vectors, weight = layer.moelora_L["default"].weight, layer.moelora_router["default"].weight
    assert weight.shape == ((4, 52) if "down" in site else (4, 6))
    x = torch.randn(2, 5, layer.in_features).requires_grad_()
    leaves = {"x": x, "vectors": vectors, "weight": weight}

    def naive() -> Tensor:
        x_TD = x.flatten(0, 1)
        if "down" in site:
            y_TO = layer.base_layer(reference.mixture_of_vectors(x_TD, vectors, weight))
        else:
            y_TO = reference.mixture_of_vectors(layer.base_layer(x_TD), vectors, weight)
        return y_TO.view(2, 5, -1)

    found, expected = gradients(lambda: layer(x), leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_one_vector_is_pefts_ia3(name: str) -> None:
    model = adapted("mov", name, num_experts=1)
    layers = tuner_layers(model)
    targets = list(layers)
    feed_forward = [path for path in targets if "self" not in path.lower() and "Attention" not in path]
    ia3 = get_peft_model(tiny_model(name), IA3Config(target_modules=targets, feedforward_modules=feed_forward)).eval()
    for path, other in tuner_layers(ia3).items():
        vector_1F = layers[path].moelora_L["default"].weight.detach()
        other.ia3_l["default"].data = vector_1F.view(other.ia3_l["default"].shape).clone()
    torch.testing.assert_close(outputs(model, name), outputs(ia3, name), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5", "bert"])
def test_its_sites_are_keys_values_and_feed_forward_activations(name: str) -> None:
    model = get_peft_model(tiny_model(name), small_config("mov", name))
    ends = {path.rpartition(".")[2] for path in tuner_layers(model)}
    assert ends == {"t5": {"k", "v", "wo"}, "bert": {"key", "value", "dense"}}.get(
        name, {"k_proj", "v_proj", "down_proj"}
    )
    parts = [layer.sites["default"].part for layer in tuner_layers(model).values()]
    assert parts.count("down") == (4 if name == "t5" else 2)
    assert parts.count("key") == parts.count("value") == (6 if name == "t5" else 2)


def test_a_vector_starts_at_one_and_shakes_the_output_when_it_moves() -> None:
    model = get_peft_model(tiny_model(), small_config("mov")).eval()
    for layer in tuner_layers(model).values():
        assert torch.equal(layer.moelora_L["default"].weight, torch.ones_like(layer.moelora_L["default"].weight))
    shake(model)
    assert (outputs(model) - outputs(tiny_model())).abs().max() > 1e-2
    assert outputs(model, input_ids=tiny_batch()["input_ids"]).isfinite().all()


@pytest.mark.parametrize(("name", "fused"), [("phi3", "qkv_proj"), ("gpt2", "c_attn")])
def test_fused_attention_is_refused_with_the_way_out(name: str, fused: str) -> None:
    with pytest.raises(TargetError, match=f"{fused}.*in one linear.*exclude_modules=.'{fused}'."):
        get_peft_model(tiny_model(name), small_config("mov", name))
    model = get_peft_model(tiny_model(name), small_config("mov", name, exclude_modules=[fused]))
    assert {layer.sites["default"].part for layer in tuner_layers(model).values()} == {"down"}


def test_bad_combinations() -> None:
    with pytest.raises(TargetError, match="none of the targeted linears .*q_proj.* plays one of the parts"):
        get_peft_model(tiny_model(), small_config("mov", target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="placement is 'feed_forward.*A vector scales"):
        MoeLoraConfig(experts="vector", placement="feed_forward")
    with pytest.raises(ConfigError, match=r"placement\.parts is \['query'\]"):
        MoeLoraConfig(experts="vector", placement={"kind": "parts", "parts": ["query"]})
    with pytest.raises(ConfigError, match="unknown key 'r' in preset 'mov'"):
        MoeLoraConfig.from_preset("mov", r=4)
