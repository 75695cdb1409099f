"""Top-k selection: golden values, the references, expert dropout, and its capacity in a router.

Shape suffixes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import pytest
import torch

from moelora.ops import reference
from moelora.routing.batch import Tokens
from moelora.selection.top_k import TopK
from tests.routing.golden import (
    LOGITS_TE,
    MIXLORA_WEIGHTS_TK,
    SMORA_GATES_TE,
    SOFTMAX_TE,
    SWITCH_WEIGHTS_TK,
    TOP2_IDS_TK,
    golden_routing,
    router_of,
)
from tests.routing.routers import BIASED, bias_of, every_token, new_router, select

RAW_2 = TopK(k=2, renormalize=False)


def test_mixlora_golden() -> None:
    routing = golden_routing(TopK(k=2))
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK, TOP2_IDS_TK)
    torch.testing.assert_close(routing.weights_TK, MIXLORA_WEIGHTS_TK, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.probs_TE, SOFTMAX_TE, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.logits_TE, LOGITS_TE)
    assert routing.sums_to_one


def test_raw_top_1_golden() -> None:
    routing = golden_routing(TopK(k=1, renormalize=False))
    torch.testing.assert_close(routing.weights_TK, SWITCH_WEIGHTS_TK, rtol=0, atol=1e-6)
    assert not routing.sums_to_one


def test_smora_golden() -> None:
    routing = golden_routing(TopK(k=2), BIASED)
    torch.testing.assert_close(routing.gates_TE() * 2, SMORA_GATES_TE, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (7, 3, 1), (7, 3, 3), (63, 8, 2), (7, 64, 8)])
@pytest.mark.parametrize("divide", [False, True], ids=["raw", "renormalized"])
def test_softmax_top_k(T: int, E: int, K: int, divide: bool) -> None:
    logits_TE = (3 * torch.randn(T, E)).requires_grad_()
    routing = select(TopK(k=K, renormalize=divide), logits_TE.softmax(-1))
    expected_TK, expected_ids_TK = reference.softmax_top_k(logits_TE, K, divide)
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK, expected_ids_TK)
    torch.testing.assert_close(routing.weights_TK, expected_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(routing.weights_TK, logits_TE, upstream)
    (expected_grad,) = torch.autograd.grad(expected_TK, logits_TE, upstream)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 2), (64, 8)])
def test_sigmoid_top_k_with_bias(T: int, E: int, K: int) -> None:
    router = new_router(TopK(k=K), BIASED, num_experts=E)
    weight_ED, bias_E = router.get_parameter("weight"), bias_of(router).normal_(std=0.2)
    torch.nn.init.normal_(weight_ED)
    x_TD = torch.randn(T, 12)
    routing = router(x_TD, every_token(1, T))
    weights_TK, ids_TK = reference.sigmoid_top_k(x_TD @ weight_ED.t(), bias_E, K)
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(routing.weights_TK, weight_ED, upstream)
    (expected,) = torch.autograd.grad(weights_TK, weight_ED, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_renormalised_top_k_is_the_softmax_over_the_chosen_logits() -> None:
    """Identity I7; it does not hold without renormalisation."""
    logits_TE = torch.randn(7, 8)
    chosen_TK = logits_TE.topk(3).values
    weights_TK = select(TopK(k=3), logits_TE.softmax(-1)).weights_TK
    torch.testing.assert_close(weights_TK, chosen_TK.softmax(-1), rtol=1e-5, atol=1e-6)
    raw_TK = select(TopK(k=3, renormalize=False), logits_TE.softmax(-1)).weights_TK
    assert not torch.allclose(raw_TK, chosen_TK.softmax(-1))


def test_ties_are_broken_alike_whatever_the_batch() -> None:
    def ids(scores_TE: torch.Tensor) -> torch.Tensor:
        found_TK = select(TopK(k=2), scores_TE).ids_TK
        assert found_TK is not None
        return found_TK

    row_E = torch.tensor([0.1, 0.2, 0.1, 0.2, 0.2, 0.1, 0.05, 0.05])
    alone = ids(row_E.view(1, -1))[0]
    for T in (2, 7, 63):
        scores_TE = torch.rand(T, 8)
        scores_TE[T // 2] = row_E
        assert torch.equal(ids(scores_TE)[T // 2], alone)
    uniform = ids(torch.full((5, 8), 0.125))
    assert (uniform == uniform[0]).all()


def test_a_bias_both_selects_and_weights() -> None:
    """As in SMoRA's code; DeepSeek-V3 would only select by it."""
    router = router_of(TopK(k=2), BIASED)
    bias_of(router).copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routing = router(LOGITS_TE, every_token(1, 3))
    assert routing.ids_TK[0].tolist() == [3, 0]
    expected = LOGITS_TE.sigmoid()[0, 3] + 0.9
    torch.testing.assert_close(routing.weights_TK[0, 0], expected / (expected + LOGITS_TE.sigmoid()[0, 0]))
    assert torch.equal(routing.probs_TE, golden_routing(TopK(k=2), BIASED).probs_TE)


# --- expert dropout ---


def test_expert_dropout_expectation() -> None:
    """Inverted scaling: with all experts chosen the mean weight over many draws is the score."""
    router = router_of(TopK(k=4, renormalize=False, expert_dropout=0.5)).train()
    draws = 20000
    routing = router(LOGITS_TE[:1].repeat(draws, 1), every_token(1, draws))
    gates_TE = routing.gates_TE()
    kept_TE = gates_TE > 0
    torch.testing.assert_close(kept_TE.float().mean(0), torch.full((4,), 0.5), rtol=0, atol=0.02)
    torch.testing.assert_close(gates_TE.mean(0), SOFTMAX_TE[0], rtol=0.04, atol=0)
    torch.testing.assert_close(gates_TE[kept_TE], (2 * SOFTMAX_TE[0]).expand(draws, 4)[kept_TE], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(routing.probs_TE[0], SOFTMAX_TE[0], rtol=0, atol=1e-6)


def test_expert_dropout_falls_to_the_next_best() -> None:
    router = router_of(TopK(k=2, renormalize=False, expert_dropout=0.5)).train()
    routing = router(LOGITS_TE[:1].repeat(200, 1), every_token(1, 200))
    assert routing.assigned_TK is not None
    for weights_K, ids_K, assigned_K in zip(routing.weights_TK, routing.ids_TK, routing.assigned_TK, strict=True):
        assert torch.equal(weights_K > 0, assigned_K)
        expected_K = torch.where(assigned_K, 2 * SOFTMAX_TE[0][ids_K], torch.zeros(2))
        torch.testing.assert_close(weights_K, expected_K, rtol=1e-5, atol=1e-5)
    counts = routing.assigned_TK.sum(-1)
    assert set(counts.tolist()) == {0, 1, 2}  # all four dropped with probability 1/16
    torch.testing.assert_close(routing.load_TE().sum(-1), counts.float())


def test_renormalised_weights_of_dropped_experts_do_not_sum_to_one() -> None:
    """All four may be dropped, and a feed-forward block must then know that its weights sum to 0."""
    router = router_of(TopK(k=2, expert_dropout=0.5)).train()
    routing = router(LOGITS_TE[:1].repeat(200, 1), every_token(1, 200))
    assert set(routing.weights_TK.sum(-1).round(decimals=5).tolist()) == {0.0, 1.0}
    assert not routing.sums_to_one


def test_expert_dropout_knows_what_it_dropped_below_zero() -> None:
    """A biased sigmoid score can be negative: that is a choice, not a dropped expert."""
    router = router_of(TopK(k=4, expert_dropout=0.5), BIASED).train()
    bias_of(router).fill_(-2.0)
    routing = router(LOGITS_TE[:1].repeat(200, 1), every_token(1, 200))
    assert routing.assigned_TK is not None
    assert abs(float(routing.assigned_TK.float().mean()) - 0.5) < 0.1


def test_a_dropped_expert_takes_no_place_of_one_below_zero() -> None:
    """With all scores below 0 the two best are two that were kept, wherever two were."""
    router = router_of(TopK(k=2, expert_dropout=0.5), BIASED).train()
    bias_of(router).fill_(-2.0)
    routing = router(LOGITS_TE[:1].repeat(400, 1), every_token(1, 400))
    assert routing.assigned_TK is not None
    both = float(routing.assigned_TK.all(-1).float().mean())
    E = LOGITS_TE.shape[-1]
    assert abs(both - (1 - (1 + E) / 2**E)) < 0.1


def test_expert_dropout_is_off_in_eval() -> None:
    routing = golden_routing(TopK(k=2, renormalize=False, expert_dropout=0.9))
    assert routing.assigned_TK is None
    assert torch.equal(routing.weights_TK, golden_routing(RAW_2).weights_TK)


# --- capacity ---


@pytest.mark.parametrize("in_eval", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_capacity(in_eval: bool, training: bool) -> None:
    selection = TopK(k=2, renormalize=False, capacity_factor=0.75, capacity_in_eval=in_eval)
    router = new_router(selection).train(training)
    weight_ED = router.get_parameter("weight")
    torch.nn.init.normal_(weight_ED)
    x_TD = torch.randn(2 * 9, 12)
    valid_BS = torch.ones(2, 9, dtype=torch.bool)
    valid_BS[1, 6:] = False
    routing = router(x_TD, Tokens(valid_BS))
    weights_TK, ids_TK = reference.softmax_top_k(x_TD @ weight_ED.t(), 2, renormalize=False)
    kept_BSK = reference.capacity_kept(ids_TK.view(2, 9, 2), 4, 0.75, valid_BS)
    assert 0 < kept_BSK[valid_BS].float().mean() < 1
    expected_TK = weights_TK * kept_BSK.view(18, 2) if training or in_eval else weights_TK
    valid_T = valid_BS.view(-1)
    torch.testing.assert_close(routing.weights_TK[valid_T], expected_TK[valid_T], rtol=1e-5, atol=1e-6)
    # an expert's excess is what balancing is to reduce, so it counts
    assert torch.equal(routing.load_TE().sum(-1), torch.full((18,), 2.0))


def test_capacity_acts_after_renormalisation() -> None:
    """A token that lost one choice keeps the weight of the other as it was."""
    router = router_of(TopK(k=2, capacity_factor=0.5, capacity_in_eval=True))
    routing = router(LOGITS_TE[:1].repeat(4, 1), every_token(1, 4))
    expected = torch.tensor([[0.731059, 0.268941], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(routing.weights_TK, expected, rtol=0, atol=1e-6)
    assert not routing.sums_to_one
