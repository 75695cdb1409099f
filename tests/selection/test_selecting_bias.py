"""A bias that selects and does not weigh (DeepSeek-V3), beside one that does both (SMoRA).

Shape suffixes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora import MoeLoraConfig, record_routing
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.scores.linear import LinearScores
from moelora.selection.top_k import TopK
from tests.adapters import adapted, outputs, router_biases, train_steps, tuner_layers
from tests.conftest import tiny_batch
from tests.routing.golden import LOGITS_TE, SOFTMAX_TE, router_of
from tests.routing.routers import bias_of, every_token, new_router

SELECTS = LinearScores(activation="sigmoid", bias=True, bias_weighs=False)
SOFTMAX_SELECTS = LinearScores(bias=True, bias_weighs=False)
WORDS: dict[str, Any] = {"scores": {"bias_weighs": False}}


def test_golden() -> None:
    """By hand: sigmoid(2) = 0.880797 and sigmoid(-1) = 0.268941, whatever the 0.9 that chose the second."""
    router = router_of(TopK(k=2), SELECTS)
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routing = router(LOGITS_TE, every_token(1, 3))
    assert routing.ids_TK[0].tolist() == [3, 0]  # 1.168941 before 0.880797 and 0.731059
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([0.233915, 0.766085]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (7, 3, 2), (63, 8, 2), (7, 64, 8)])
def test_equals_the_reference(T: int, E: int, K: int) -> None:
    router = new_router(TopK(k=K), SELECTS, num_experts=E)
    weight_ED, bias_E = router.get_parameter("weight"), bias_of(router).normal_(std=0.5)
    torch.nn.init.normal_(weight_ED)
    x_TD = torch.randn(T, 12)
    routing = router(x_TD, every_token(1, T))
    weights_TK, ids_TK = reference.sigmoid_top_k(x_TD @ weight_ED.t(), bias_E, K, bias_weighs=False)
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(routing.weights_TK, weight_ED, upstream)
    (expected,) = torch.autograd.grad(weights_TK, weight_ED, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_with_a_softmax() -> None:
    router = router_of(TopK(k=1, renormalize=False), SOFTMAX_SELECTS)
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 0.0, 2.0]))
    routing = router(LOGITS_TE, every_token(1, 3))
    assert routing.ids_TK.tolist() == [[3]] * 3
    torch.testing.assert_close(routing.weights_TK, SOFTMAX_TE[:, 3:], rtol=0, atol=1e-6)


def test_weights_that_are_next_to_nothing_are_renormalised_all_the_same() -> None:
    """What a bias chooses need not be the largest of a softmax."""
    router = router_of(TopK(k=2), SOFTMAX_SELECTS)
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 3.0, 3.0]))
    routing = router(torch.tensor([[400.0, 0.0, -400.0, -400.0]]), every_token(1, 1))
    assert routing.ids_TK[0].tolist() == [2, 3]
    assert routing.weights_TK.isfinite().all()


def test_a_dropped_expert_is_not_chosen_whatever_its_bias() -> None:
    router = router_of(TopK(k=2, renormalize=False, expert_dropout=0.5), SELECTS).train()
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 0.0, 9.0]))
    routing = router(LOGITS_TE[:1].repeat(200, 1), every_token(1, 200))
    assert torch.equal(routing.weights_TK > 0, routing.assigned_TK)
    has_last_T = (routing.ids_TK == 3).any(-1) & (routing.gates_TE()[:, 3] > 0)
    assert 0.35 < has_last_T.float().mean() < 0.65
    found = routing.gates_TE()[has_last_T, 3]
    torch.testing.assert_close(found, torch.full_like(found, 2 * float(LOGITS_TE.sigmoid()[0, 3])))


def test_experts_that_are_off_are_not_chosen_whatever_their_bias() -> None:
    router = router_of(TopK(k=2), SELECTS)
    bias_of(router).copy_(torch.tensor([0.0, 9.0, 0.0, 0.9]))
    router.on = (0, 2, 3)
    routing = router(LOGITS_TE, every_token(1, 3))
    assert routing.ids_TK[0].tolist() == [3, 0]
    torch.testing.assert_close(routing.weights_TK[0], torch.tensor([0.233915, 0.766085]), rtol=0, atol=1e-6)


def test_in_a_model_the_bias_moves_and_the_weights_do_not() -> None:
    """With as many experts as are chosen the bias changes nothing; SMoRA's changes the weights."""
    for words, same in ((WORDS, True), ({}, False)):
        model = adapted("smora", r=4, top_k=4, bias_update_rate=0.1, **words)
        before = outputs(model)
        for layer in tuner_layers(model).values():
            layer.routers["default"].tensor("bias").data += torch.tensor([0.5, 0.0, -0.1, 0.0])
        assert torch.allclose(outputs(model), before, rtol=0, atol=1e-6) == same
    model = adapted("smora", bias_update_rate=0.1, **WORDS)
    before_biases = router_biases(model)
    train_steps(model, steps=1)
    assert all((bias - before_biases[name]).abs().max() > 0.05 for name, bias in router_biases(model).items())
    with record_routing(model) as recorder:
        outputs(model)
    assert all(bool((record.routing.weights_TK > 0).all()) for record in recorder.records)


def test_padding_and_batch_mates_change_nothing() -> None:
    model = adapted("smora", **WORDS)
    batch = tiny_batch(batch_size=3)
    whole = outputs(model)
    length = int(batch["attention_mask"][0].sum())
    with torch.no_grad():
        alone = model(input_ids=batch["input_ids"][:1, :length]).logits
    torch.testing.assert_close(whole[:1, :length], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"bias_weighs": False}, "scores.bias_weighs is False; allowed: True without a bias"),
        ({"bias_weighs": 1, "bias": True}, "scores.bias_weighs is 1; allowed: True, False"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LinearScores(**words)


@pytest.mark.parametrize("selection", ["dense", "nearest"])
def test_it_is_refused_where_nothing_is_chosen_by_rank(selection: str) -> None:
    with pytest.raises(ConfigError, match=rf"bias_weighs is False; allowed: True with '{selection}' selection"):
        MoeLoraConfig(scores=SELECTS, selection=selection)
