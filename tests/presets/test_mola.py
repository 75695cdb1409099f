"""MoLA in a model: experts by layer, MixLoRA's routing on each linear, and what does not fit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model
from torch import Tensor

from moelora import MoeLoraConfig, balance_losses, record_routing
from moelora.compose import drop_experts, switch_experts
from moelora.errors import ComposeError, ConfigError, TargetError
from moelora.ops import reference
from moelora.routing.router import Router
from tests.adapters import adapted, expert_tensors, small_config, tuner_layers
from tests.balance.layers import SWITCH, exact, loss_of, record
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close, gradients
from tests.routing.golden import MOLA_AUX, golden_routing
from tests.routing.routers import every_token, site_of


def experts_of_layers(model: Any) -> dict[str, int]:
    return {name: layer.routers["default"].num_experts for name, layer in tuner_layers(model).items()}


@pytest.mark.parametrize(
    ("num_layers", "given", "expected"),
    [
        (2, [2, 4], [2, 4]),
        (4, [2, 4], [2, 2, 4, 4]),
        (4, [2, 3, 4, 5], [2, 3, 4, 5]),
        (4, [3], [3] * 4),
        (2, 3, [3] * 2),
    ],
)
def test_experts_by_layer(num_layers: int, given: Any, expected: list[int]) -> None:
    config = small_config("mola", num_experts=given)
    base = tiny_model(num_hidden_layers=num_layers)
    counted = config.num_trainable_parameters(base)
    model = get_peft_model(base, config)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    found = experts_of_layers(model)
    assert len(found) == 7 * num_layers
    for name, E in found.items():
        assert expected[int(name.split(".")[2])] == E, name


@pytest.mark.parametrize("layer_index", [0, 1])
def test_a_layer_equals_the_reference(layer_index: int) -> None:
    """Forward and the gradient of the input, the experts and the router: MixLoRA's weights on one linear."""
    model = adapted("mola")
    layer = tuner_layers(model)[f"model.layers.{layer_index}.mlp.down_proj"]
    experts, router = expert_tensors(layer), layer.moelora_router["default"].get_parameter("weight")
    scaling = model.peft_config["default"].scaling
    x_TD = torch.randn(9, 52).requires_grad_()
    leaves = {"x": x_TD, **experts, "router": router}

    def naive() -> Tensor:
        weights_TK, ids_TK = reference.softmax_top_k(x_TD @ router.t(), 2, renormalize=True)
        gates_TE = torch.zeros(9, len(router)).scatter(1, ids_TK, weights_TK)
        delta_TO = reference.mixture_linear(x_TD, experts["A.weight"], experts["B.weight"], gates_TE, scaling)
        return layer.base_layer(x_TD) + delta_TO

    found, expected = gradients(lambda: layer(x_TD), leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_its_routing_is_that_of_mixlora() -> None:
    """The same router on the same tokens gives the same decision, bit for bit."""
    mola, mixlora = (MoeLoraConfig.from_preset(name, num_experts=6) for name in ("mola", "mixlora"))
    routers = [Router(site_of(12, 6), config.scores, config.selection) for config in (mola, mixlora)]
    routers[1].load_state_dict(routers[0].state_dict())
    x_TD = torch.randn(17, 12)
    found, expected = (router(x_TD, every_token(1, 17)) for router in routers)
    assert torch.equal(found.gates_TE(), expected.gates_TE())
    assert torch.equal(found.probs_TE, expected.probs_TE)


@pytest.mark.parametrize("k", [1, 2, 5])
def test_softmax_top_k_renormalised_is_the_softmax_over_the_top_k_logits(k: int) -> None:
    logits_TE = torch.randn(31, 7)
    weights_TK, ids_TK = reference.softmax_top_k(logits_TE, k, renormalize=True)
    best_TK, expected_ids_TK = logits_TE.topk(k)
    assert torch.equal(ids_TK, expected_ids_TK)
    torch.testing.assert_close(weights_TK, best_TK.softmax(-1), rtol=1e-5, atol=1e-6)


def test_its_loss_is_golden_and_the_mean_over_layers_of_different_sizes() -> None:
    mola = MoeLoraConfig.from_preset("mola", balance_coef=1e-3)
    assert exact(loss_of(SWITCH, record(golden_routing(mola.selection)))) == MOLA_AUX
    model = adapted("mola", balance_coef=1.0).train()
    with record_routing(model) as recorder:
        model(**tiny_batch())
    (loss, _) = balance_losses(recorder.records, model.peft_config["default"].balance)
    terms = [
        reference.switch_balance_loss(r.routing.probs_TE, r.routing.load_TE(), r.valid_T) for r in recorder.records
    ]
    assert {r.num_experts for r in recorder.records} == {2, 4}
    torch.testing.assert_close(loss, torch.stack(terms).mean(), rtol=1e-5, atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model()
    before = set(dict(model.named_modules()))
    with pytest.raises(TargetError, match=r"per_layer is \[2, 4, 6, 8\], 4 numbers for 2 adapted layers"):
        get_peft_model(model, MoeLoraConfig.from_preset("mola", task_type="CAUSAL_LM"))
    assert set(dict(model.named_modules())) == before
    with pytest.raises(ConfigError, match=r"top_k is 3; allowed: 1 to num_experts \(2 where there are fewest\)"):
        MoeLoraConfig.from_preset("mola", num_experts=[2, 4], top_k=3)
    with pytest.raises(ConfigError, match=r"experts.per_layer is \[2, 0\]"):
        MoeLoraConfig.from_preset("mola", num_experts=[2, 0])
    with pytest.raises(ConfigError, match=r"experts.per_layer is \[2, 4\]; allowed: .*the largest num_experts \(8\)"):
        MoeLoraConfig(experts={"kind": "lora", "num_experts": 8, "per_layer": [2, 4]})


def test_editing_experts_by_number_is_refused(tmp_path: Path) -> None:
    model = adapted("mola")
    with pytest.raises(ComposeError, match="from 2 to 4 experts, by layer"):
        switch_experts(model, {0: False})
    model.save_pretrained(str(tmp_path / "adapter"))
    with pytest.raises(ComposeError, match="from 2 to 4 experts, by layer"):
        drop_experts(tmp_path / "adapter", tmp_path / "out", [0])
    assert not (tmp_path / "out").exists()
