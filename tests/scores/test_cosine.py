"""Cosine scores: the reference, their bounds, and what they do not depend on.

Shape suffixes: T tokens, D input features, F features of the sphere, E experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.errors import ConfigError
from moelora.ops import reference_options
from moelora.routing.decision import Routing
from moelora.routing.router import Router
from moelora.scores.cosine import CosineScores
from moelora.selection.dense import Dense
from moelora.selection.top_k import TopK
from tests.ops.compare import assert_close, gradients
from tests.routing.routers import every_token, new_router


def shaken(scores: CosineScores, **words: Any) -> Router:
    router = new_router(words.pop("selection", Dense()), scores, **words)
    for parameter in router.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return router


def route(router: Router, x_TD: Tensor) -> Routing:
    found: Routing = router(x_TD, every_token(1, len(x_TD)))
    return found


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize(("T", "E", "features"), [(1, 1, 1), (7, 3, 5), (63, 8, 4)])
def test_equals_the_reference(T: int, E: int, features: int, activation: Any) -> None:
    """Forward, and the gradient of the tokens and of every tensor."""
    router = shaken(CosineScores(features=features, temperature=0.4, activation=activation), num_experts=E)
    leaves = {"x": torch.randn(T, 12, requires_grad=True), **dict(router.named_parameters())}

    def naive() -> Tensor:
        logits_TE = reference_options.cosine_logits(
            leaves["x"], leaves["projection"], leaves["weight"], leaves["log_scale"], temperature=0.4
        )
        return logits_TE.softmax(-1) if activation == "softmax" else logits_TE.sigmoid()

    found = gradients(lambda: route(router, leaves["x"]).weights_TK, leaves)
    for name, tensor in gradients(naive, leaves).items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=1e-5)


def test_golden() -> None:
    """By hand: angles of 0, 60 and 90 degrees at a temperature of one half, whatever the lengths."""
    router = new_router(Dense(), CosineScores(features=2, temperature=0.5), in_features=2, num_experts=3)
    router.get_parameter("projection").data.copy_(7 * torch.eye(2))
    router.get_parameter("weight").data.copy_(torch.tensor([[0.1, 0.0], [1.0, 3**0.5], [0.0, 5.0]]))
    routing = route(router, torch.tensor([[3.0, 0.0]]))
    torch.testing.assert_close(routing.logits_TE, torch.tensor([[2.0, 1.0, 0.0]]))
    torch.testing.assert_close(routing.weights_TK, torch.tensor([[0.665241, 0.244728, 0.090031]]), rtol=0, atol=1e-6)


def test_the_length_of_a_token_says_nothing_and_logits_are_bounded() -> None:
    router, x_TD = shaken(CosineScores(temperature=0.3)), torch.randn(9, 12)
    router.get_parameter("log_scale").data.zero_()
    logits_TE = route(router, x_TD).logits_TE
    torch.testing.assert_close(route(router, 1000 * x_TD).logits_TE, logits_TE, rtol=1e-4, atol=1e-5)
    assert logits_TE.abs().max() <= 1 / 0.3 + 1e-5
    router.get_parameter("log_scale").data.fill_(50.0)
    assert 1 / 0.3 < route(router, x_TD).logits_TE.abs().max() <= 100


def test_a_token_of_zeros_is_finite() -> None:
    routing = route(shaken(CosineScores()), torch.zeros(1, 12))
    torch.testing.assert_close(routing.weights_TK, torch.full((1, 4), 0.25))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_it_is_computed_in_fp32(dtype: torch.dtype) -> None:
    router, x_TD = shaken(CosineScores()).to(dtype), torch.randn(9, 12).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = route(router, x_TD)
    assert found.logits_TE.dtype == torch.float32
    expected = route(router.float(), x_TD.float())
    torch.testing.assert_close(found.logits_TE, expected.logits_TE, rtol=1e-5, atol=1e-5)


def test_experts_that_are_off() -> None:
    router, x_TD = shaken(CosineScores(), selection=TopK(k=2)), torch.randn(9, 12)
    expected = route(router, x_TD).logits_TE[:, [0, 2]].softmax(-1)
    router.on = (0, 2)
    torch.testing.assert_close(route(router, x_TD).gates_TE()[:, [0, 2]], expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"features": 0}, r"scores\.features is 0"),
        ({"temperature": 0.001}, r"scores\.temperature is 0\.001; allowed: a number of at least 0\.01"),
        ({"activation": "relu"}, r"scores\.activation is 'relu'; allowed: 'softmax', 'sigmoid'"),
    ],
)
def test_values(words: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        CosineScores(**words)
