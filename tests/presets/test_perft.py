"""PERFT: each form is its equation, beside the base's own mixture of experts; E is R with the base's router."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from moelora.layers.block import MixtureBlock
from moelora.ops import reference
from tests.adapters import adapted, expert_tensors, outputs, shake, small_config, tuner_layers
from tests.conftest import MOE_NAMES, tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients

NAME = "model.layers.1.mlp"
FORMS = ("perft_r", "perft_e", "perft_d", "perft_s")


def gates(preset: str, layer: Any, x_TD: Tensor) -> Tensor:
    """The weights of the experts by the paper's equations."""
    if preset in ("perft_d", "perft_s"):
        return torch.ones(len(x_TD), 2 if preset == "perft_d" else 1)
    if preset == "perft_r":
        weights_TK, ids_TK = reference.softmax_top_k(x_TD @ layer.moelora_router["default"].weight.t(), 2, True)
        return torch.zeros(len(x_TD), 3).scatter(1, ids_TK, weights_TK)
    gate = layer.base_layer.gate
    weights_TK, ids_TK = reference.softmax_top_k(x_TD @ gate.weight.t(), 2, getattr(gate, "norm_topk_prob", True))
    return torch.zeros(len(x_TD), 4).scatter(1, ids_TK, weights_TK)


@pytest.mark.parametrize("name", MOE_NAMES)
@pytest.mark.parametrize("preset", FORMS)
def test_a_layer_equals_the_reference(preset: str, name: str) -> None:
    """Forward and the gradient of the input, the experts, and the router where it has one of its own."""
    layer = tuner_layers(adapted(preset, name))[NAME]
    assert isinstance(layer, MixtureBlock)
    experts, x = expert_tensors(layer), torch.randn(2, 5, 36).requires_grad_()
    leaves = {"x": x, **experts}
    if preset == "perft_r":
        leaves["router"] = layer.moelora_router["default"].weight

    def naive() -> Tensor:
        x_TD = x.flatten(0, 1)
        delta_TD = reference.mixture_linear(
            x_TD, experts["A.weight"], experts["B.weight"], gates(preset, layer, x_TD), 32 / 3
        )
        return layer.base_layer(x) + delta_TD.view(x.shape)

    found, expected = gradients(lambda: layer(x), leaves), gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", MOE_NAMES)
def test_e_is_r_with_a_router_tied_to_the_bases(name: str) -> None:
    model = adapted("perft_e", name)
    normalised = name != "olmoe"
    words: dict[str, Any] = {"num_experts": 4, "top_k": 2, "renormalize": normalised}
    other = adapted("perft_r", name, **words)
    for path, layer in tuner_layers(other).items():
        source = tuner_layers(model)[path]
        layer.moelora_router["default"].weight.data = source.base_layer.gate.weight.data.clone()
        for key in "AB":
            getattr(layer, f"moelora_{key}")["default"].weight.data = getattr(source, f"moelora_{key}")[
                "default"
            ].weight.data.clone()
    assert (outputs(model, name) - outputs(tiny_model(name), name)).abs().max() > 1e-3
    torch.testing.assert_close(outputs(model, name), outputs(other, name), rtol=1e-5, atol=1e-6)


def test_the_bases_own_record_of_its_router_is_as_without_an_adapter() -> None:
    """Models collect the router's logits with hooks, for their own balance loss."""
    batch = tiny_batch("mixtral")
    expected = tiny_model("mixtral")(**batch, output_router_logits=True)
    found = get_peft_model(tiny_model("mixtral"), small_config("perft_e", "mixtral")).eval()(
        **batch, output_router_logits=True
    )
    assert len(found.router_logits) == len(expected.router_logits) == 2
    for ours, theirs in zip(found.router_logits, expected.router_logits, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(found.aux_loss, expected.aux_loss)


def test_d_is_a_lora_of_the_summed_rank_and_s_is_d_with_one() -> None:
    model = adapted("perft_d", "mixtral", num_experts=2)
    wide = adapted("perft_s", "mixtral", r=6, lora_alpha=64)
    for path, layer in tuner_layers(wide).items():
        tensors = expert_tensors(tuner_layers(model)[path])
        layer.moelora_A["default"].weight.data = tensors["A.weight"].detach().flatten(0, 1).unsqueeze(0).clone()
        both = torch.cat(list(tensors["B.weight"].detach()), 1)
        layer.moelora_B["default"].weight.data = both.unsqueeze(0).clone()
    torch.testing.assert_close(outputs(model, "mixtral"), outputs(wide, "mixtral"), rtol=1e-5, atol=1e-6)


def test_blocks_can_be_picked() -> None:
    config = small_config("perft_r", "mixtral", target_modules=["layers.1.mlp"])
    model = get_peft_model(tiny_model("mixtral"), config)
    shake(model)
    assert list(tuner_layers(model)) == [NAME]
    config = small_config("perft_r", "mixtral", target_modules=["mlp"], layers_to_transform=[0])
    assert list(tuner_layers(get_peft_model(tiny_model("mixtral"), config))) == ["model.layers.0.mlp"]


@pytest.mark.parametrize("preset", FORMS)
def test_a_dense_base_is_refused(preset: str) -> None:
    with pytest.raises(TargetError, match="LlamaForCausalLM has no mixture-of-experts blocks.*'mixlora'"):
        get_peft_model(tiny_model(), small_config(preset))


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match=r"num_experts is 8; allowed: 4, the experts of the base's own mixture at"):
        get_peft_model(tiny_model("olmoe"), MoeLoraConfig.from_preset("perft_e"))
    with pytest.raises(ConfigError, match="Only there is a router of the base model"):
        MoeLoraConfig(scores="base_router", selection="dense")
    with pytest.raises(ConfigError, match="has chosen already"):
        MoeLoraConfig(scores="base_router", placement="moe_block", selection="top_k")
    with pytest.raises(TargetError, match="match none of the mixture-of-experts blocks"):
        get_peft_model(tiny_model("mixtral"), small_config("perft_r", target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match="unrouted_modules"):
        MoeLoraConfig(placement={"kind": "moe_block", "unrouted_modules": "rest"})
