"""LLaVA-MoLE: one decision for the linears of a block, what trains its router, and what it is equal to."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, record_routing
from moelora.balance.losses import balance_losses
from moelora.errors import ConfigError, ExportError, TargetError
from moelora.export.native_moe.routing import check_choices
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.ops.reference_linears import feed_forward_of_mixtures
from moelora.selection.top_k import TopK
from tests.adapters import (
    adapted,
    adapter_tensors,
    assert_close_gradients,
    gradients,
    outputs,
    shake,
    small_config,
    tuner_layers,
)
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close
from tests.ops.compare import gradients as all_gradients
from tests.routing.routers import every_token
from tests.training.runs import toy_rows, train


def block_of(model: Any) -> tuple[str, Any]:
    """The last adapted block."""
    return [(name, layer) for name, layer in tuner_layers(model).items() if isinstance(layer, MixtureFeedForward)][-1]


def experts_of(layer: Any) -> dict[str, tuple[Tensor, Tensor, float]]:
    factors = {role: layer.lora_factors(role, "default") for role in layer.form.linears}
    return {role: (f.a_ERD, f.b_EOR, f.scaling) for role, f in factors.items() if f is not None}


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "bert"])
@pytest.mark.parametrize("gate", [False, True], ids=["one", "gate"])
@pytest.mark.parametrize("compute", ["fast", "reference"])
def test_a_block_equals_the_reference(name: str, gate: bool, compute: str) -> None:
    """Forward and the gradient of the input, the experts and the router."""
    words: dict[str, Any] = {"multiply_by_gate": gate, "compute": compute, "top_k": 2 if gate else 1}
    model = adapted("llava_mole", name, **words)
    _, layer = block_of(model)
    weight = layer.routers["default"].get_parameter("weight")
    loras = experts_of(layer)
    assert weight.shape == (4, 36)
    assert set(loras) == set(layer.form.linears)
    x = torch.randn(2, 5, 36).requires_grad_()
    leaves = {"x": x, "weight": weight}
    leaves |= {f"{role} {i}": loras[role][i] for role in loras for i in (0, 1)}
    activation: Any = layer.base_layer.get_submodule(layer.form.activation)

    def naive() -> Tensor:
        x_TD = x.flatten(0, 1)
        probs_TE = (x_TD @ weight.t()).softmax(-1)
        chosen_TE = torch.zeros_like(probs_TE).scatter(1, probs_TE.topk(words["top_k"]).indices, 1.0)
        gates_TE = chosen_TE * probs_TE if gate else chosen_TE + 0 * probs_TE
        y_TD = feed_forward_of_mixtures(x_TD, gates_TE, layer.dense(), loras, layer.form.kind, activation)
        return y_TD.view(2, 5, -1)

    found, expected = all_gradients(lambda: layer(x), leaves), all_gradients(naive, leaves)
    for key, tensor in expected.items():
        assert_close(key, found[key], tensor, rtol=1e-4, atol=1e-5 * max(1.0, float(tensor.abs().max())))
    assert bool(found["weight"].any()) is gate


@pytest.mark.parametrize("name", ["llama", "phi", "phi3", "bert"])
def test_without_the_gate_it_is_the_same_experts_as_whole_blocks(name: str) -> None:
    """Weight 1 commutes with everything: `W x + B_k A_k x` at each linear is expert k of MixLoRA."""
    ours = adapted("llava_mole", name)
    config = small_config("llava_mole", name)
    config.placement = MoeLoraConfig(placement="feed_forward").placement
    whole = get_peft_model(tiny_model(name), config).eval()
    shake(whole)
    assert adapter_tensors(ours).keys() == adapter_tensors(whole).keys()
    torch.testing.assert_close(outputs(ours, name), outputs(whole, name), rtol=1e-4, atol=1e-5)
    if name != "bert":  # whose head is random
        assert_close_gradients(gradients(ours, tiny_batch(name)), gradients(whole, tiny_batch(name)))
    with_gate = adapted("llava_mole", name, multiply_by_gate=True)
    assert (outputs(with_gate, name) - outputs(ours, name)).abs().max() > 1e-4


def test_with_a_gate_it_is_not_a_whole_block_scaled() -> None:
    """B = 0 is the base model whatever the weights are; `mixlora` with raw weights scales the block."""
    model = get_peft_model(tiny_model(), small_config("llava_mole", multiply_by_gate=True)).eval()
    torch.testing.assert_close(outputs(model), outputs(tiny_model()), rtol=1e-5, atol=1e-6)
    top_1 = get_peft_model(tiny_model(), small_config("mixlora", top_k=1)).eval()
    assert (outputs(top_1) - outputs(tiny_model())).abs().max() > 1e-5


def test_the_decision_is_the_blocks_and_holds_for_its_linears() -> None:
    model = adapted("llava_mole")
    seen: dict[str, Tensor] = {}
    layer = tuner_layers(model)["model.layers.1.mlp"]
    layer.register_forward_pre_hook(lambda module, inputs: seen.update(x=inputs[0]))
    with record_routing(model) as recorder, torch.no_grad():
        model(**tiny_batch())
    assert [record.layer for record in recorder.records] == ["model.layers.0.mlp", "model.layers.1.mlp"]
    weight = layer.moelora_router["default"].get_parameter("weight")
    expected = (seen["x"].flatten(0, 1) @ weight.t()).argmax(-1)
    routing = recorder.records[1].routing
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK[:, 0], expected)
    assert torch.equal(routing.weights_TK, torch.ones_like(routing.weights_TK))
    assert len(set(expected.tolist())) > 1
    # plain LoRA on the attention linears
    routers = [name for name, each in tuner_layers(model).items() if each.routers]
    assert routers == ["model.layers.0.mlp", "model.layers.1.mlp"]


@pytest.mark.parametrize("gate", [False, True], ids=["one", "gate"])
def test_what_trains_the_router(gate: bool) -> None:
    """Without the gate the task gives it a gradient of zero, not none, and the balance loss one that is not."""
    model = adapted("llava_mole", multiply_by_gate=gate, balance_coef=1.0).train()
    routers = {name: p for name, p in model.named_parameters() if ".moelora_router." in name}
    assert len(routers) == 2
    with record_routing(model) as recorder:
        loss = model(**tiny_batch()).loss
    loss.backward(retain_graph=True)
    assert all(p.grad is not None and bool(p.grad.any()) is gate for p in routers.values())
    balance = balance_losses(recorder.records, model.peft_config["default"].balance)[0]
    model.zero_grad()
    balance.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 1e-6 for p in routers.values())


def test_training_moves_the_router_by_the_balance_loss() -> None:
    found = []
    for coef in (1e-2, 1.0):
        run = train(adapted("llava_mole", balance_coef=coef, lora_alpha=0.3), toy_rows())
        found.append({name: grad for name, grad in run.gradients[0].items() if ".moelora_router." in name})
    for name, grad in found[0].items():
        torch.testing.assert_close(100 * grad, found[1][name], rtol=1e-3, atol=1e-7)
        assert grad.any()


def test_weights_of_one() -> None:
    choice = TopK(k=2, renormalize=False, multiply_by_gate=False, expert_dropout=0.5)
    model = adapted("sira", top_k=2)
    layer = tuner_layers(model)["model.layers.0.mlp.up_proj"]
    router = layer.routers["default"].train()
    router.selection = choice
    routing = router(torch.randn(40, 36), every_token(1, 40))
    assert routing.assigned_TK is not None
    assert torch.equal(routing.weights_TK, routing.assigned_TK.float())
    assert set(routing.weights_TK.unique().tolist()) == {0.0, 1.0}
    assert not routing.sums_to_one


def test_bad_combinations() -> None:
    with pytest.raises(ConfigError, match="multiply_by_gate is False: each weight is 1.*no balance loss that would"):
        MoeLoraConfig.from_preset("llava_mole", balance_coef=0.0)
    assert MoeLoraConfig.from_preset("llava_mole", balance_coef=0.0, inference_mode=True).balance == []
    assert MoeLoraConfig.from_preset("llava_mole", balance_coef=0.0, num_experts=1).balance == []
    with pytest.raises(ConfigError, match=r"selection\.renormalize is True; allowed: False with multiply_by_gate"):
        TopK(multiply_by_gate=False)
    with pytest.raises(ConfigError, match="experts is 'dora'; allowed: LoRAs with the placement"):
        MoeLoraConfig(experts="dora", placement="feed_forward_linears")
    with pytest.raises(TargetError, match="the placement is 'feed_forward_linears', but none of the targeted linears"):
        get_peft_model(tiny_model(), small_config("llava_mole", target_modules=["q_proj"]))
    selection = {"kind": "top_k", "k": 1, "renormalize": False, "multiply_by_gate": False}
    config = MoeLoraConfig(
        placement="feed_forward", selection=selection, balance={"kind": "switch", "coef": 0.1}, task_type="CAUSAL_LM"
    )
    with pytest.raises(ExportError, match="selection with multiply_by_gate is False"):
        check_choices(config)
