"""The threshold that each token learns: golden values, the reference with every gradient, and who passes.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora.ops import reference
from moelora.routing.batch import Tokens
from moelora.routing.router import Router
from moelora.selection.learned_threshold import LearnedThreshold, ThresholdRouting
from tests.ops.compare import assert_close, gradients
from tests.routing.golden import (
    ADAMOLE_THRESHOLD_LOGITS_T,
    ADAMOLE_THRESHOLDS_T,
    ADAMOLE_WEIGHTS_TE,
    LOGITS_TE,
    adamole_routing,
)
from tests.routing.routers import every_token, new_router, site_of


def spread_router(selection: LearnedThreshold, num_experts: int, seed: int = 0) -> Router:
    """A router whose scores pass the threshold for some experts and not for others."""
    router = new_router(selection, num_experts=num_experts)
    generator = torch.Generator().manual_seed(seed)
    for name in router.pieces:
        tensor = router.get_parameter(name).data
        tensor.copy_(0.5 * torch.randn(tensor.shape, generator=generator))
    return router


def test_adamole_golden() -> None:
    routing = adamole_routing(LearnedThreshold())
    assert routing.ids_TK is None
    assert isinstance(routing, ThresholdRouting)
    torch.testing.assert_close(routing.threshold_T1.squeeze(1), ADAMOLE_THRESHOLDS_T, rtol=0, atol=1e-6)
    torch.testing.assert_close(routing.gates_TE(), ADAMOLE_WEIGHTS_TE, rtol=0, atol=1e-6)
    assert torch.equal(routing.load_TE(), (ADAMOLE_WEIGHTS_TE > 0).float())


def test_the_reference_gives_the_golden_values() -> None:
    weights_TE, thresholds_T = reference.learned_threshold(LOGITS_TE, ADAMOLE_THRESHOLD_LOGITS_T, 0.25)
    torch.testing.assert_close(thresholds_T, ADAMOLE_THRESHOLDS_T, rtol=0, atol=1e-6)
    torch.testing.assert_close(weights_TE, ADAMOLE_WEIGHTS_TE, rtol=0, atol=1e-6)


@pytest.mark.parametrize("max_threshold", [None, 0.05, 0.6, 1.0], ids=str)
@pytest.mark.parametrize("E", [1, 3, 8])
@pytest.mark.parametrize("T", [1, 7, 33])
def test_equals_the_reference(T: int, E: int, max_threshold: float | None) -> None:
    """Forward, and the gradients of the tokens and of each tensor of the router."""
    router = spread_router(LearnedThreshold(max_threshold=max_threshold), E)
    x_TD = torch.randn(T, 12).requires_grad_()
    leaves: dict[str, Tensor] = {"x": x_TD, **{name: router.get_parameter(name) for name in router.pieces}}
    assert set(leaves) == {"x", "weight", "threshold_weight", "threshold_bias"}

    def ours() -> Tensor:
        routing = router(x_TD, every_token(1, T))
        assert isinstance(routing, ThresholdRouting)
        return torch.cat([routing.gates_TE(), routing.threshold_T1, routing.probs_TE], 1)

    def naive() -> Tensor:
        logits_TE = torch.stack([leaves["weight"] @ x_D for x_D in x_TD])
        threshold_logits_T = (
            torch.stack([leaves["threshold_weight"][0] @ x_D for x_D in x_TD]) + leaves["threshold_bias"][0]
        )
        tau_max = 1 / E if max_threshold is None else max_threshold
        weights_TE, thresholds_T = reference.learned_threshold(logits_TE, threshold_logits_T, tau_max)
        return torch.cat([weights_TE, thresholds_T.unsqueeze(1), logits_TE.softmax(-1)], 1)

    found, expected = gradients(ours, leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_the_comparison_has_experts_on_both_sides_of_the_threshold() -> None:
    """Guards the test above, also for tokens that no expert passes for when tau_max is more than 1 / E."""
    x_TD = torch.randn(200, 12)
    passed_TE = spread_router(LearnedThreshold(), 8)(x_TD, every_token(1, 200)).load_TE()
    assert 0.2 < float(passed_TE.mean()) < 0.8
    none_T = spread_router(LearnedThreshold(max_threshold=1.0), 8)(x_TD, every_token(1, 200)).gates_TE().sum(-1) == 0
    assert 0 < float(none_T.float().mean()) < 1


@pytest.mark.parametrize("E", [1, 2, 3, 5, 7, 8, 10, 64])
@pytest.mark.parametrize("spread", [0.0, 1e-8, 1e-7, 1e-6, 1.0, 30.0])
@pytest.mark.parametrize("threshold_bias", [-30.0, 0.0, 5.0, 30.0])
def test_at_least_one_expert_passes(E: int, spread: float, threshold_bias: float) -> None:
    """Also where the threshold is all of 1 / E and the scores are equal up to rounding."""
    router = new_router(LearnedThreshold(), num_experts=E)
    router.get_parameter("weight").data.normal_(std=spread)
    router.get_parameter("threshold_bias").data.fill_(threshold_bias)
    routing = router(torch.randn(500, 12), every_token(1, 500))
    assert routing.load_TE().sum(-1).min() >= 1
    gates_TE = routing.gates_TE()
    assert gates_TE.isfinite().all()
    assert gates_TE.min() >= 0
    if threshold_bias < 17:  # from there on the sigmoid is 1 in fp32, and equal scores pass with nothing above it
        torch.testing.assert_close(gates_TE.sum(-1), torch.ones(500), rtol=0, atol=1e-5)


def test_its_tensors_start_as_those_of_a_linear() -> None:
    wide = 5000
    weight, bias = LearnedThreshold().params(site_of(wide, 8))
    assert (weight.shape, bias.shape) == ((1, wide), (1, 1))
    bound = wide**-0.5
    for param in (weight, bias):
        tensor = torch.full(param.shape, float("nan"))
        param.init.fill(tensor)
        assert param.trainable
        assert 0 < float(tensor.abs().max()) <= bound
    tensor = torch.zeros(weight.shape)
    weight.init.fill(tensor)
    assert float(tensor.abs().max()) > 0.99 * bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decision_is_that_of_fp32(dtype: torch.dtype) -> None:
    router = spread_router(LearnedThreshold(), 8).to(dtype)
    x_TD = torch.randn(63, 12).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = router(x_TD, every_token(1, 63))
    exact = router.float()(x_TD.float(), every_token(1, 63))
    assert torch.equal(found.gates_TE(), exact.gates_TE())
    assert isinstance(found, ThresholdRouting)
    assert isinstance(exact, ThresholdRouting)
    assert torch.equal(found.threshold_T1, exact.threshold_T1)
    assert found.gates_TE().dtype == torch.float32


def test_a_token_decides_alone() -> None:
    """The rest of the batch and the padding mean nothing to it."""
    selection = LearnedThreshold()
    router = spread_router(selection, 8)
    x_TD = torch.randn(14, 12)
    valid_BS = torch.ones(2, 7, dtype=torch.bool)
    valid_BS[0, :3] = False
    together = router(x_TD, Tokens(valid_BS))
    for t in range(14):
        alone = router(x_TD[t : t + 1], every_token(1, 1))
        torch.testing.assert_close(together.gates_TE()[t], alone.gates_TE()[0], rtol=1e-5, atol=1e-6)
    assert not selection.reads_batch
