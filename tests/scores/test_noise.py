"""Noisy logits in training (noisy top-k gating).

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moelora.errors import ConfigError
from moelora.ops import reference, reference_options
from moelora.routing.decision import Routing
from moelora.routing.router import Router
from moelora.scores.linear import LinearScores
from moelora.selection.top_k import TopK
from tests.adapters import adapted, tuner_layers
from tests.ops.compare import assert_close, gradients
from tests.routing.routers import every_token, new_router

NOISY = LinearScores(noise=True)


def shaken(E: int = 4, K: int = 2) -> Router:
    router = new_router(TopK(k=K), NOISY, num_experts=E)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router.train()


def route(router: Router, x_TD: Tensor) -> Routing:
    found: Routing = router(x_TD, every_token(1, len(x_TD)))
    return found


@pytest.mark.parametrize(("T", "E", "K"), [(1, 1, 1), (7, 3, 2), (63, 8, 2)])
def test_equals_the_reference(T: int, E: int, K: int) -> None:
    """Softmax of the top-k noisy logits, and the gradient of both linears and of the tokens."""
    router = shaken(E, K)
    leaves = {"x": torch.randn(T, 12, requires_grad=True), **dict(router.named_parameters())}
    torch.manual_seed(3)
    draws_TE = torch.randn(T, E)

    def naive() -> Tensor:
        logits_TE = reference_options.noisy_logits(
            leaves["x"] @ leaves["weight"].t(), leaves["x"] @ leaves["noise_weight"].t(), draws_TE
        )
        return reference.softmax_top_k(logits_TE, K, renormalize=True)[0]

    def fast() -> Tensor:
        torch.manual_seed(3)
        return route(router, leaves["x"]).weights_TK

    if K == E:  # then a single weight is 1 whatever the noise is
        torch.testing.assert_close(fast(), naive())
        return
    found = gradients(fast, leaves)
    for name, tensor in gradients(naive, leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_at_first_its_spread_is_that_of_a_softplus_of_zero() -> None:
    router = new_router(TopK(k=2), LinearScores(noise=True, init_std=0.0)).train()
    assert not any(bool(parameter.any()) for parameter in router.parameters())
    logits_TE = route(router, torch.randn(20000, 12)).logits_TE.detach()
    assert abs(float(logits_TE.mean())) < 0.01
    assert abs(float(logits_TE.std()) - (0.693147 + 0.01)) < 0.01


def test_it_is_off_in_eval() -> None:
    router, x_TD = shaken().eval(), torch.randn(9, 12)
    expected = torch.nn.functional.linear(x_TD, router.get_parameter("weight"))
    torch.testing.assert_close(route(router, x_TD).logits_TE, expected)
    assert not torch.allclose(route(router.train(), x_TD).logits_TE, expected, atol=0.1)


def test_a_frozen_router_has_a_frozen_spread() -> None:
    layer = tuner_layers(adapted("random_router", scores={"noise": True}))["model.layers.0.mlp"]
    assert not layer.moelora_router["default"].noise_weight.requires_grad


def test_values() -> None:
    with pytest.raises(ConfigError, match="scores.noise is 1; allowed: True, False"):
        LinearScores(noise=1)  # type: ignore[arg-type]
