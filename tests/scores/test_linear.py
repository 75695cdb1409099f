"""Scores are computed in fp32 whatever surrounds them."""

from __future__ import annotations

import pytest
import torch

from moelora.scores.base import RouterInput, Scored
from moelora.scores.linear import LinearScores, router_logits
from tests.routing.golden import LOGITS_TE, SOFTMAX_TE
from tests.routing.routers import BIASED, SIGMOID, SOFTMAX, every_token


def scored(choice: LinearScores, logits_TE: torch.Tensor, **tensors: torch.Tensor) -> Scored:
    """The scores of tokens that are their own logits."""
    given = {"weight": torch.eye(logits_TE.shape[1]), **tensors}
    return choice.score(
        RouterInput(logits_TE, every_token(1, len(logits_TE)), logits_TE.shape[-1], given, {}, training=False)
    )


def test_softmax_golden() -> None:
    found = scored(SOFTMAX, LOGITS_TE)
    torch.testing.assert_close(found.scores_TE, SOFTMAX_TE, rtol=0, atol=1e-6)
    torch.testing.assert_close(found.logits_TE, LOGITS_TE)
    assert found.probs_TE is found.scores_TE
    assert found.is_softmax


def test_a_bias_moves_the_scores_but_not_the_distribution_of_the_loss() -> None:
    bias_E = torch.tensor([0.5, 0.0, -1.0, 0.0])
    plain = scored(SIGMOID, LOGITS_TE)
    found = scored(BIASED, LOGITS_TE, bias=bias_E)
    torch.testing.assert_close(found.scores_TE, plain.scores_TE + bias_E)
    assert torch.equal(found.probs_TE, plain.probs_TE)
    assert not found.is_softmax
    assert not plain.is_softmax


def test_sigmoid_scores_are_a_distribution_for_the_loss() -> None:
    found = scored(SIGMOID, LOGITS_TE)
    scores_TE, probs_TE = found.scores_TE, found.probs_TE
    torch.testing.assert_close(scores_TE, 1 / (1 + torch.exp(-LOGITS_TE)))
    torch.testing.assert_close(probs_TE.sum(-1), torch.ones(3))
    torch.testing.assert_close(probs_TE * scores_TE.sum(-1, keepdim=True), scores_TE)


def test_sigmoid_scores_far_below_zero_stay_finite() -> None:
    found = scored(SIGMOID, torch.full((1, 4), -200.0))
    assert torch.equal(found.scores_TE, torch.zeros(1, 4))
    assert found.probs_TE.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_router_logits_are_fp32(dtype: torch.dtype, autocast: bool) -> None:
    x_TD, weight_ED = torch.randn(7, 300).to(dtype), torch.randn(8, 300).to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        logits_TE = router_logits(x_TD, weight_ED)
    assert logits_TE.dtype == torch.float32
    torch.testing.assert_close(logits_TE.double(), x_TD.double() @ weight_ED.double().t(), rtol=1e-5, atol=1e-4)


def test_gradients_come_back_in_the_dtype_of_the_weight() -> None:
    x_TD = torch.randn(7, 12, dtype=torch.bfloat16, requires_grad=True)
    weight_ED = torch.randn(4, 12, dtype=torch.bfloat16, requires_grad=True)
    router_logits(x_TD, weight_ED).sum().backward()
    assert x_TD.grad is not None
    assert weight_ED.grad is not None
    assert x_TD.grad.dtype == weight_ED.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("needs", ["both", "tokens", "weight"])
def test_logits_and_gradients_equal_plain_autograd(dtype: torch.dtype, needs: str) -> None:
    """The copy in fp32 that is made twice gives to the bit what the kept one gives, twice in a row too."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randn(33, 24, generator=generator).to(dtype) for _ in range(2)]
    grads = [torch.randn(33, 5, generator=generator) for _ in range(2)]
    weight_ED = torch.randn(5, 24, generator=generator)

    def run(plain: bool) -> list[torch.Tensor]:
        inputs = [x.clone().requires_grad_(needs != "weight") for x in tokens]
        weight = weight_ED.clone().requires_grad_(needs != "tokens")
        call = (lambda x, w: torch.nn.functional.linear(x.float(), w)) if plain else router_logits
        outputs = [call(x, weight) for x in inputs]
        torch.autograd.backward(outputs, grads)
        return [*outputs, *(leaf.grad for leaf in (*inputs, weight) if leaf.grad is not None)]

    for actual, expected in zip(run(plain=False), run(plain=True), strict=True):
        assert actual.dtype == expected.dtype
        assert torch.equal(actual, expected)
