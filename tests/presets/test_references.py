"""Every preset is its equation: forward and every gradient of a layer against naive functions of tensors.

Those of which nothing else is to be said are here; the others have a file of their own.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora import presets
from moelora.layers.modules import dense_weight
from moelora.ops import reference
from tests.adapters import adapted, expert_tensors, tuner_layers
from tests.ops.compare import assert_close, gradients

LINEAR, BLOCK = "model.layers.0.self_attn.q_proj", "model.layers.0.mlp"


def top_k(x_TD: Tensor, weight_ED: Tensor, renormalize: bool) -> Tensor:
    weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 2, renormalize)
    return torch.zeros(len(x_TD), len(weight_ED)).scatter(1, ids_TK, weights_TK)


def threshold(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    probs_TE = (x_TD @ weight_ED.t()).softmax(-1)
    kept_TE = probs_TE * (probs_TE >= 1 / len(weight_ED))
    return kept_TE / kept_TE.sum(-1, keepdim=True)


def biased_sigmoid(x_TD: Tensor, weight_ED: Tensor, bias_E: Tensor | None) -> Tensor:
    assert bias_E is not None
    values_TK, ids_TK = ((x_TD @ weight_ED.t()).sigmoid() + bias_E).topk(2)
    return torch.zeros(len(x_TD), len(weight_ED)).scatter(1, ids_TK, values_TK / values_TK.sum(-1, keepdim=True))


Gates = Callable[[Tensor, Tensor, Tensor | None], Tensor]
HERE: dict[str, Gates] = {
    "mixlora": lambda x_TD, weight_ED, _: top_k(x_TD, weight_ED, renormalize=True),
    "random_router": lambda x_TD, weight_ED, _: top_k(x_TD, weight_ED, renormalize=True),
    "sira": lambda x_TD, weight_ED, _: top_k(x_TD, weight_ED, renormalize=False),
    "smora": biased_sigmoid,
    "molora": lambda x_TD, weight_ED, _: (x_TD @ weight_ED.t()).softmax(-1),
    "hydralora": lambda x_TD, weight_ED, _: (x_TD @ weight_ED.t()).softmax(-1),
    "adamole_fixed": threshold,
}
"""Gates of the tokens, of the router's weight and its bias."""

ELSEWHERE: dict[str, str] = {
    "adamole": "presets.test_adamole:test_a_layer_equals_the_reference",
    "graphmoe": "presets.test_graphmoe:test_a_layer_equals_the_reference",
    "llava_mole": "presets.test_llava_mole:test_a_block_equals_the_reference",
    "lora": "test_peft_exactness:test_one_expert_is_pefts_lora_in_a_model",
    "loramoe": "presets.test_loramoe:test_it_is_molora_on_those_linears",
    "mhr": "presets.test_task_routing:test_a_layer_equals_the_reference",
    "mixda": "presets.test_mixda:test_a_layer_equals_the_reference",
    "mixdora": "presets.test_mixdora:test_a_model_equals_the_references",
    "mixlora_dynamic": "presets.test_mixlora_family:test_a_block_equals_the_reference",
    "mixlora_switch": "presets.test_mixlora_family:test_a_block_equals_the_reference",
    "mixphm": "presets.test_mixphm:test_a_layer_equals_the_reference",
    "moelora_task": "presets.test_task_routing:test_a_layer_equals_the_reference",
    "mola": "presets.test_mola:test_a_layer_equals_the_reference",
    "mor1e": "presets.test_mor1e:test_a_layer_equals_the_reference",
    "mos": "presets.test_mos:test_it_equals_a_lora_of_the_shards_forward_and_gradients",
    "mov": "presets.test_mov:test_a_layer_equals_the_reference",
    "mpoe": "presets.test_mpoe:test_a_block_equals_the_reference",
    "perft_d": "presets.test_perft:test_a_layer_equals_the_reference",
    "perft_e": "presets.test_perft:test_a_layer_equals_the_reference",
    "perft_r": "presets.test_perft:test_a_layer_equals_the_reference",
    "perft_s": "presets.test_perft:test_a_layer_equals_the_reference",
    "poly": "presets.test_task_routing:test_a_layer_equals_the_reference",
    "smore": "presets.test_smore:test_a_layer_equals_the_reference",
    "soft_moa": "presets.test_soft_moa:test_a_layer_equals_the_reference",
    "thor": "presets.test_thor:test_a_block_equals_the_reference",
}


def test_every_preset_is_compared_with_a_reference() -> None:
    assert sorted([*HERE, *ELSEWHERE]) == sorted(presets.available())
    for preset, place in ELSEWHERE.items():
        module, _, name = place.partition(":")
        test = getattr(importlib.import_module(f"tests.{module}"), name)
        assert "gradients(" in inspect.getsource(test), f"{place} of {preset} compares no gradients"


@pytest.mark.parametrize("preset", HERE)
def test_a_layer_equals_the_reference(preset: str) -> None:
    model = adapted(preset)
    scaling, is_block = model.peft_config["default"].scaling, preset in ("mixlora", "random_router")
    layer: Any = tuner_layers(model)[BLOCK if is_block else LINEAR]
    experts, router = expert_tensors(layer), layer.moelora_router["default"]
    weight_ED, bias_E = router.get_parameter("weight"), dict(router.named_parameters()).get("bias")
    x_TD = torch.randn(9, 36).requires_grad_()
    leaves = {"x": x_TD, **experts, **({"router": weight_ED} if preset != "random_router" else {})}

    def naive() -> Tensor:
        gates_TE = HERE[preset](x_TD, weight_ED, bias_E)
        if not is_block:
            delta_TO = reference.mixture_linear(x_TD, experts["A.weight"], experts["B.weight"], gates_TE, scaling)
            return layer.base_layer(x_TD) + delta_TO
        loras = {role: (experts[f"A.{role}"], experts[f"B.{role}"], scaling) for role in ("gate", "up", "down")}
        linears = {role: dense_weight(layer.linear(role)) for role in loras}
        return reference.mixture_feed_forward(x_TD, gates_TE, linears, loras, "gated", torch.nn.functional.silu)

    found, expected = gradients(lambda: layer(x_TD[None])[0], leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert_close(name, found[name] / scale, tensor / scale, rtol=1e-4, atol=1e-6)
