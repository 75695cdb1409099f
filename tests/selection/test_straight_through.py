"""Renormalised weights with the gradient of those that are not; and dense selection in training alone.

Shape suffixes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.selection.dense import Dense
from moelora.selection.top_k import TopK
from tests.adapters import adapted, gradients, outputs, tuner_layers
from tests.conftest import tiny_batch, tiny_model
from tests.ops.compare import assert_close
from tests.routing.golden import (
    LOGITS_TE,
    MIXLORA_WEIGHTS_TK,
    SWITCH_WEIGHTS_TK,
    TOP2_IDS_TK,
    golden_routing,
    router_of,
)
from tests.routing.routers import every_token, select

STRAIGHT: dict[str, Any] = {"selection": {"renormalize": True, "straight_through": True}}
DENSE_FIRST: dict[str, Any] = {"selection": {"dense_in_training": True}}
PLAIN: dict[str, Any] = {"expert_dropout": 0.0, "capacity_factor": None}
DENSE_SIRA: dict[str, Any] = {**PLAIN, **DENSE_FIRST}
AS_DENSE: dict[str, Any] = {**PLAIN, "selection": "dense"}
AS_SPARSE: dict[str, Any] = PLAIN


@pytest.mark.parametrize(("T", "E", "K"), [(1, 2, 1), (7, 3, 1), (63, 8, 2)])
def test_the_value_is_one_and_the_gradient_the_others(T: int, E: int, K: int) -> None:
    logits_TE = (3 * torch.randn(T, E)).requires_grad_()
    routing = select(TopK(k=K, straight_through=True), logits_TE.softmax(-1))
    value_TK, ids_TK = reference.softmax_top_k(logits_TE, K, renormalize=True)
    raw_TK, _ = reference.softmax_top_k(logits_TE, K, renormalize=False)
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, value_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(routing.weights_TK, logits_TE, upstream)
    (expected,) = torch.autograd.grad(raw_TK, logits_TE, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    assert grad.abs().max() > 1e-3


def test_golden() -> None:
    routing = golden_routing(TopK(k=2, straight_through=True))
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK, TOP2_IDS_TK)
    torch.testing.assert_close(routing.weights_TK, MIXLORA_WEIGHTS_TK, rtol=0, atol=1e-6)
    assert torch.equal(golden_routing(TopK(k=1, straight_through=True)).weights_TK, torch.ones(3, 1))


@pytest.mark.parametrize("base", ["llama", "phi"])
def test_a_block_of_one_choice_is_not_scaled_and_its_router_learns(base: str) -> None:
    """As with the raw weight: the gradient of the router is <upstream, block> times that of the probability.

    Phi's blocks have a bias behind them, which is part of what a weight multiplies.
    """
    model = adapted("mixlora", base, top_k=1, balance_coef=0.0, **STRAIGHT)
    layer = tuner_layers(model)["model.layers.0.mlp"]
    weight_ED = layer.moelora_router["default"].weight
    x_TD = torch.randn(9, 36)
    upstream_TD = torch.randn(9, 36)
    y_TD = layer(x_TD)
    found = torch.autograd.grad((y_TD * upstream_TD).sum(), weight_ED)[0]
    raw_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 1, renormalize=False)
    inner_T = (y_TD.detach() * upstream_TD).sum(-1)  # with weight 1 the output is the expert's
    expected = torch.autograd.grad((raw_TK[:, 0] * inner_T).sum(), weight_ED)[0]
    assert_close("router", found, expected, rtol=1e-4, atol=1e-5)
    assert len(ids_TK.unique()) > 1


def test_it_starts_at_the_base_and_its_router_learns_of_the_task() -> None:
    model = adapted("mixlora", top_k=1, **STRAIGHT).train()
    found = gradients(model, tiny_batch())
    assert all(found[name].abs().max() > 1e-6 for name in found if "moelora_router" in name)


def test_dense_in_training_and_sparse_outside() -> None:
    router, dense = router_of(TopK(k=1, renormalize=False, dense_in_training=True)), router_of(Dense())
    trained = router.train()(LOGITS_TE, every_token(1, 3))
    assert trained.ids_TK is None
    assert torch.equal(trained.gates_TE(), dense(LOGITS_TE, every_token(1, 3)).gates_TE())
    outside = router.eval()(LOGITS_TE, every_token(1, 3))
    torch.testing.assert_close(outside.weights_TK, SWITCH_WEIGHTS_TK, rtol=0, atol=1e-6)


def test_dense_in_training_is_the_dense_model_s_gradient() -> None:
    """Forward, and the gradient of every tensor; in evaluation it is the sparse model."""
    model, dense, sparse = adapted("sira", **DENSE_SIRA), adapted("sira", **AS_DENSE), adapted("sira", **AS_SPARSE)
    found, expected = (gradients(each.train(), tiny_batch()) for each in (model, dense))
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(outputs(model.eval()), outputs(sparse))
    assert (outputs(model) - outputs(dense.eval())).abs().max() > 1e-4


def test_dense_training_of_a_renormalised_top_1_is_allowed() -> None:
    """Its router has a gradient there."""
    config = MoeLoraConfig.from_preset("mixlora", top_k=1, selection={"renormalize": True, "dense_in_training": True})
    assert config.selection.k == 1
    assert config.num_trainable_parameters(tiny_model()) > 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"straight_through": True, "renormalize": False}, "straight_through is True; allowed: False without renorm"),
        ({"straight_through": 1}, "straight_through is 1; allowed: True, False"),
        ({"dense_in_training": True, "expert_dropout": 0.5}, "dense_in_training is True; allowed: False with expert_"),
        ({"dense_in_training": True, "capacity": 3}, "dense_in_training is True; allowed: False with expert_dropout"),
        ({"dense_in_training": True, "straight_through": True}, "dense_in_training is True; allowed: False with"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TopK(**words)


def test_choices_that_nobody_makes_are_not_counted() -> None:
    with pytest.raises(ConfigError, match="dense_in_training is True; allowed: False with the balance choice"):
        MoeLoraConfig.from_preset("smora", **DENSE_FIRST)
