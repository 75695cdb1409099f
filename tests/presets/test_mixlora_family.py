"""MixLoRA-Dynamic and MixLoRA-Switch in a model: a block is the equation, and the base inside it is scaled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import balance_losses, record_routing
from moelora.layers.modules import dense_weight
from moelora.ops import reference
from moelora.scores.linear import LinearScores
from moelora.selection.top_k import TopK
from tests.adapters import adapted, expert_tensors, outputs, small_config, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients
from tests.routing.routers import every_token, new_router

LAYER = "model.layers.0.mlp"


def naive_block(model: Any, x_TD: Tensor, gates_TE: Tensor) -> Tensor:
    layer = tuner_layers(model)[LAYER]
    experts, scaling = expert_tensors(layer), model.peft_config["default"].scaling
    loras = {role: (experts[f"A.{role}"], experts[f"B.{role}"], scaling) for role in ("gate", "up", "down")}
    linears = {role: dense_weight(layer.linear(role)) for role in loras}
    return reference.mixture_feed_forward(x_TD, gates_TE, linears, loras, "gated", torch.nn.functional.silu)


@pytest.mark.parametrize("T", [5, 41])
@pytest.mark.parametrize("preset", ["mixlora_dynamic", "mixlora_switch"])
def test_a_block_equals_the_reference(preset: str, T: int) -> None:
    """Forward and every gradient; Switch's capacity of 3 is exceeded in training."""
    model = adapted(preset).train()
    layer = tuner_layers(model)[LAYER]
    weight_ED = layer.moelora_router["default"].get_parameter("weight")
    x_TD = torch.randn(T, 36).requires_grad_()
    dropped = 0

    def gates(logits_TE: Tensor) -> Tensor:
        nonlocal dropped
        if preset == "mixlora_dynamic":
            return reference.softmax_top_p(logits_TE, 0.8, renormalize=False)
        weights_T1, ids_T1 = reference.softmax_top_k(logits_TE, 1, renormalize=False)
        # one row of T tokens, each expert takes the first three that chose it
        kept, taken = [], [0] * 4
        for expert in ids_T1.flatten().tolist():
            taken[expert] += 1
            kept.append(taken[expert] <= 3)
        dropped = kept.count(False)
        weights_T1 = weights_T1 * torch.tensor(kept).unsqueeze(1)
        return torch.zeros(T, 4).scatter(1, ids_T1, weights_T1)

    leaves = {"x": x_TD, **expert_tensors(layer), "router": weight_ED}
    found = gradients(lambda: layer(x_TD[None])[0], leaves)
    expected = gradients(lambda: naive_block(model, x_TD, gates(x_TD @ weight_ED.t())), leaves)
    for name, tensor in expected.items():
        scale = float(tensor.abs().max())
        assert_close(name, found[name] / scale, tensor / scale, rtol=1e-4, atol=1e-6)
    assert (dropped > 0) == (preset == "mixlora_switch" and T > 12)


@pytest.mark.parametrize("preset", ["mixlora_dynamic", "mixlora_switch"])
def test_b_zero_scales_the_block_by_the_sum_of_the_weights(preset: str) -> None:
    words: dict[str, Any] = {"top_p": 0.5} if preset == "mixlora_dynamic" else {}
    model = get_peft_model(tiny_model(), small_config(preset, **words)).eval()
    layer = tuner_layers(model)[LAYER]
    x_TD = torch.randn(9, 36)
    routing = layer.routers["default"](x_TD, every_token(1, 9))
    sum_T1 = routing.weights_TK.sum(-1, keepdim=True)
    assert 0 < sum_T1.min() < 0.99
    torch.testing.assert_close(layer(x_TD), sum_T1 * layer.base_layer(x_TD), rtol=1e-5, atol=1e-6)


def test_a_capacity_holds_in_training_only() -> None:
    """In evaluation an output does not depend on what else is in the sequence."""
    model = adapted("mixlora_switch")
    with record_routing(model) as recorder:
        outputs(model)
        model.train()
        outputs(model)
    without, limited = recorder.records[:2], recorder.records[2:]
    assert all((record.routing.weights_TK > 0).all() for record in without)
    assert any((record.routing.weights_TK == 0).any() for record in limited)


def test_switch_has_both_losses() -> None:
    model = adapted("mixlora_switch").train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
    balance = model.peft_config["default"].balance
    switch, z = balance_losses(recorder.records, balance)
    naive_switch, naive_z = [], []
    for record in recorder.records:
        r, valid_T = record.routing, record.valid_T
        argmax_TE = torch.nn.functional.one_hot(r.probs_TE.argmax(-1), 4)
        naive_switch.append(reference.switch_balance_loss(r.probs_TE, argmax_TE, valid_T))
        naive_z.append(r.logits_TE[valid_T].logsumexp(-1).square().mean())
    torch.testing.assert_close(switch, torch.stack(naive_switch).mean(), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(z, torch.stack(naive_z).mean(), rtol=1e-5, atol=1e-6)


def test_jitter_is_the_routers_alone_and_in_training_only() -> None:
    router = new_router(TopK(k=2), LinearScores(init_std=1.0, jitter=0.1))
    x_TD = torch.randn(500, 12)
    clean = router(x_TD, every_token(1, 500)).logits_TE
    assert torch.equal(router(x_TD, every_token(1, 500)).logits_TE, clean)
    noisy = router.train()(x_TD, every_token(1, 500)).logits_TE
    # sum_d W_ed x_td u_td with u of U(-0.1, 0.1), whose variance is 0.01 / 3
    variance_TE = (x_TD**2 @ router.get_parameter("weight").t() ** 2) * 0.01 / 3
    z_TE = (noisy - clean) / variance_TE.sqrt()
    assert abs(z_TE.mean()) < 0.1
    assert 0.9 < z_TE.std() < 1.1
    # whole blocks see their own input: with a router of zeros, jitter changes nothing at all
    model = adapted("mixlora_switch", router_jitter=0.5, capacity=None).train()
    for name, p in model.named_parameters():
        if "router" in name:
            p.data.zero_()
    torch.testing.assert_close(outputs(model), outputs(model), rtol=0, atol=0)
