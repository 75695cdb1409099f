"""The router: golden values of the methods, every activation against its reference, and its parameters and buffers.

Shape suffixes: T tokens, D input features, E experts, K chosen experts of a token.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch

from moelora.config import RoutingConfig
from moelora.ops import reference
from moelora.routing.router import Router
from tests.routing.golden import (
    LOGITS_TE,
    MIXLORA_WEIGHTS_TK,
    SMORA_BIAS_SIGN_E,
    SMORA_GATES_TE,
    SOFTMAX_TE,
    SWITCH_WEIGHTS_TK,
    TOP2_IDS_TK,
    golden_routing,
    router_of,
)

SMORA = RoutingConfig(score="sigmoid", top_k=2, bias_update_rate=1e-5)


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def test_mixlora_golden() -> None:
    routing = golden_routing(RoutingConfig(top_k=2))
    assert routing.ids_TK is not None
    assert torch.equal(routing.ids_TK, TOP2_IDS_TK)
    torch.testing.assert_close(routing.weights_TK, MIXLORA_WEIGHTS_TK, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.probs_TE, SOFTMAX_TE, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.logits_TE, LOGITS_TE)


def test_raw_top_1_golden() -> None:
    routing = golden_routing(RoutingConfig(top_k=1, renormalize=False))
    torch.testing.assert_close(routing.weights_TK, SWITCH_WEIGHTS_TK, rtol=0, atol=1e-6)


def test_dense_golden() -> None:
    routing = golden_routing(RoutingConfig(top_k=None, renormalize=False))
    assert routing.ids_TK is None
    torch.testing.assert_close(routing.gates_TE(), SOFTMAX_TE, rtol=0, atol=1e-6)


def test_smora_golden() -> None:
    routing = golden_routing(SMORA)
    torch.testing.assert_close(routing.gates_TE() * 2, SMORA_GATES_TE, rtol=0, atol=1e-6)


def test_smora_bias_step_golden() -> None:
    router = router_of(SMORA)
    router.update_bias(golden_routing(SMORA).load_TE().sum(0))
    assert router.bias is not None
    torch.testing.assert_close(router.bias, 1e-5 * SMORA_BIAS_SIGN_E, rtol=1e-6, atol=0)
    expected = reference.bias_update(torch.zeros(4), TOP2_IDS_TK, 1e-5)
    torch.testing.assert_close(router.bias, expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("T", [1, 7, 63])
@pytest.mark.parametrize(("E", "K"), [(1, 1), (3, 2), (64, 8)])
def test_sigmoid_top_k_with_bias(T: int, E: int, K: int) -> None:
    router = Router(12, E, RoutingConfig(score="sigmoid", top_k=K, bias_update_rate=0.1, init_std=None)).eval()
    assert router.bias is not None
    router.bias.normal_(std=0.2)
    x_TD = torch.randn(T, 12)
    routing = router(x_TD, ones(1, T))
    weights_TK, ids_TK = reference.sigmoid_top_k(x_TD @ router.weight.t(), router.bias, K)
    assert torch.equal(routing.ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, weights_TK, rtol=1e-5, atol=1e-6)
    upstream = torch.randn(T, K)
    (grad,) = torch.autograd.grad(routing.weights_TK, router.weight, upstream)
    (expected,) = torch.autograd.grad(weights_TK, router.weight, upstream)
    torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-5)


def test_bias_both_selects_and_weights() -> None:
    """As in SMoRA's code; DeepSeek-V3 would only select by it."""
    router = router_of(SMORA)
    assert router.bias is not None
    router.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.9]))
    routing = router(LOGITS_TE, ones(1, 3))
    assert routing.ids_TK[0].tolist() == [3, 0]
    expected = LOGITS_TE.sigmoid()[0, 3] + 0.9
    torch.testing.assert_close(routing.weights_TK[0, 0], expected / (expected + LOGITS_TE.sigmoid()[0, 0]))
    assert torch.equal(routing.probs_TE, golden_routing(SMORA).probs_TE)


@pytest.mark.parametrize("load_E", [[4.0, 4.0, 4.0], [7.0, 4.0, 1.0], [12.0, 0.0, 0.0]], ids=str)
def test_bias_update(load_E: list[float]) -> None:
    router = Router(4, 3, RoutingConfig(score="sigmoid", top_k=1, bias_update_rate=0.01))
    assert router.bias is not None
    router.bias.copy_(torch.tensor([0.1, -0.2, 0.0]))
    ids_TK = torch.tensor([[e] for e, count in enumerate(load_E) for _ in range(int(count))])
    expected = reference.bias_update(router.bias, ids_TK, 0.01)
    router.update_bias(torch.tensor(load_E))
    torch.testing.assert_close(router.bias, expected)


def test_a_router_without_bias_has_no_bias_to_update() -> None:
    router = Router(4, 3, RoutingConfig())
    router.update_bias(torch.tensor([1.0, 2.0, 3.0]))
    assert router.bias is None
    assert "bias" not in router.state_dict()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_decisions_are_those_of_fp32(dtype: torch.dtype, score: str) -> None:
    """bf16 tokens and weights, under autocast: the decision is fp32 math on the same numbers."""
    router = Router(300, 8, RoutingConfig(score=score, top_k=2, init_std=1.0)).to(dtype).eval()  # type: ignore[arg-type]
    x_TD = torch.randn(63, 300).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        routing = router(x_TD, ones(1, 63))
    exact = copy.deepcopy(router).float()(x_TD.float(), ones(1, 63))
    assert routing.weights_TK.dtype == routing.probs_TE.dtype == torch.float32
    for name in ("logits_TE", "probs_TE", "weights_TK", "ids_TK"):
        assert torch.equal(getattr(routing, name), getattr(exact, name)), name


def test_expert_dropout_expectation() -> None:
    """Inverted scaling: with dense routing the mean weight over many draws is the score."""
    config = RoutingConfig(top_k=None, renormalize=False, expert_dropout=0.5)
    router = router_of(config).train()
    draws = 20000
    routing = router(LOGITS_TE[:1].repeat(draws, 1), ones(1, draws))
    kept_TE = routing.weights_TK > 0
    torch.testing.assert_close(kept_TE.float().mean(0), torch.full((4,), 0.5), rtol=0, atol=0.02)
    torch.testing.assert_close(routing.weights_TK.mean(0), SOFTMAX_TE[0], rtol=0.04, atol=0)
    torch.testing.assert_close(
        routing.weights_TK[kept_TE], (2 * SOFTMAX_TE[0]).expand(draws, 4)[kept_TE], rtol=1e-5, atol=1e-5
    )
    torch.testing.assert_close(routing.probs_TE[0], SOFTMAX_TE[0], rtol=0, atol=1e-6)


def test_expert_dropout_falls_to_the_next_best() -> None:
    router = router_of(RoutingConfig(top_k=2, renormalize=False, expert_dropout=0.5)).train()
    routing = router(LOGITS_TE[:1].repeat(200, 1), ones(1, 200))
    assert routing.assigned_TK is not None
    for weights_K, ids_K, assigned_K in zip(routing.weights_TK, routing.ids_TK, routing.assigned_TK, strict=True):
        assert torch.equal(weights_K > 0, assigned_K)
        expected_K = torch.where(assigned_K, 2 * SOFTMAX_TE[0][ids_K], torch.zeros(2))
        torch.testing.assert_close(weights_K, expected_K, rtol=1e-5, atol=1e-5)
    counts = routing.assigned_TK.sum(-1)
    assert set(counts.tolist()) == {0, 1, 2}  # all four dropped with probability 1/16
    torch.testing.assert_close(routing.load_TE().sum(-1), counts.float())


def test_expert_dropout_knows_what_it_dropped_below_zero() -> None:
    """A biased sigmoid score can be negative: that is a choice, not a dropped expert."""
    router = router_of(RoutingConfig(score="sigmoid", top_k=4, expert_dropout=0.5, bias_update_rate=1.0)).train()
    assert router.bias is not None
    router.bias.fill_(-2.0)
    routing = router(LOGITS_TE[:1].repeat(200, 1), ones(1, 200))
    assert routing.assigned_TK is not None
    assert abs(float(routing.assigned_TK.float().mean()) - 0.5) < 0.1


def test_expert_dropout_is_off_in_eval() -> None:
    config = RoutingConfig(top_k=2, renormalize=False, expert_dropout=0.9)
    routing = golden_routing(config)
    assert routing.assigned_TK is None
    assert torch.equal(routing.weights_TK, golden_routing(RoutingConfig(top_k=2, renormalize=False)).weights_TK)


@pytest.mark.parametrize("in_eval", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_capacity(in_eval: bool, training: bool) -> None:
    config = RoutingConfig(top_k=2, renormalize=False, capacity_factor=0.75, capacity_in_eval=in_eval)
    router = Router(12, 4, config).train(training)
    torch.nn.init.normal_(router.weight)
    x_TD = torch.randn(2 * 9, 12)
    valid_BS = ones(2, 9)
    valid_BS[1, 6:] = False
    routing = router(x_TD, valid_BS)
    weights_TK, ids_TK = reference.softmax_top_k(x_TD @ router.weight.t(), 2, renormalize=False)
    kept_BSK = reference.capacity_kept(ids_TK.view(2, 9, 2), 4, 0.75, valid_BS)
    assert 0 < kept_BSK[valid_BS].float().mean() < 1
    expected_TK = weights_TK * kept_BSK.view(18, 2) if training or in_eval else weights_TK
    valid_T = valid_BS.view(-1)
    torch.testing.assert_close(routing.weights_TK[valid_T], expected_TK[valid_T], rtol=1e-5, atol=1e-6)
    # an expert's excess is what balancing is to reduce, so it counts
    assert torch.equal(routing.load_TE().sum(-1), torch.full((18,), 2.0))


def test_capacity_acts_after_renormalisation() -> None:
    """A token that lost one choice keeps the weight of the other as it was."""
    router = router_of(RoutingConfig(top_k=2, capacity_factor=0.5, capacity_in_eval=True))
    routing = router(LOGITS_TE[:1].repeat(4, 1), ones(1, 4))
    expected = torch.tensor([[0.731059, 0.268941], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    torch.testing.assert_close(routing.weights_TK, expected, rtol=0, atol=1e-6)


def test_gates_are_the_weights_at_the_chosen_experts() -> None:
    routing = golden_routing(RoutingConfig(top_k=2))
    expected_TE = torch.zeros(3, 4)
    for t in range(3):
        for k in range(2):
            expected_TE[t, TOP2_IDS_TK[t, k]] = MIXLORA_WEIGHTS_TK[t, k]
    torch.testing.assert_close(routing.gates_TE(), expected_TE, rtol=0, atol=1e-6)
    assert routing.num_experts == 4
    assert routing.num_choices == 2


def test_load_of_dense_routing_is_the_distribution() -> None:
    routing = golden_routing(RoutingConfig(top_k=None, renormalize=False))
    assert torch.equal(routing.load_TE(), routing.probs_TE)
    assert not routing.load_TE().requires_grad


@pytest.mark.parametrize("trainable", [True, False])
def test_a_frozen_router_is_a_saved_buffer(trainable: bool) -> None:
    router = Router(12, 4, RoutingConfig(trainable=trainable))
    assert (len(list(router.parameters())) == 1) == trainable
    assert list(router.state_dict()) == ["weight"]


def test_the_initial_weight() -> None:
    wide = 5000
    assert abs(float(Router(wide, 8, RoutingConfig(init_std=0.02)).weight.detach().std()) - 0.02) < 1e-3
    uniform = Router(wide, 8, RoutingConfig(init_std=None)).weight
    bound = 1 / math.sqrt(wide)
    assert 0.99 * bound < float(uniform.detach().abs().max()) <= bound
    assert Router(wide, 8, RoutingConfig(init_std=0.0)).weight.abs().max() == 0


def test_the_bias_stays_fp32() -> None:
    """Steps of 1e-5 would be rounded away in half precision."""
    router = Router(12, 4, SMORA)
    router.update_bias(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert router.bias is not None
    before = router.bias.clone()
    for cast in (router.bfloat16(), router.half(), router.to(torch.bfloat16)):
        assert cast.bias is not None
        assert cast.bias.dtype == torch.float32
        assert torch.equal(cast.bias, before)
        assert cast.weight.dtype != torch.float32


def test_state_round_trip() -> None:
    router = Router(12, 4, SMORA)
    router.update_bias(torch.tensor([3.0, 0.0, 0.0, 0.0]))
    assert set(router.state_dict()) == {"weight", "bias"}
    other = Router(12, 4, SMORA)
    other.load_state_dict(router.state_dict())
    for name, tensor in router.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor)


def test_repr_says_how_it_routes() -> None:
    text = repr(Router(12, 4, RoutingConfig(top_k=3)))
    assert "in_features=12" in text
    assert "num_experts=4" in text
    assert "top_k=3" in text
