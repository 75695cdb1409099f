"""Scores are computed in fp32 whatever surrounds them."""

from __future__ import annotations

import pytest
import torch

from moelora.routing.scores import router_logits, scores_from_logits
from tests.routing.golden import LOGITS_TE, SOFTMAX_TE


def test_softmax_golden() -> None:
    scores_TE, probs_TE = scores_from_logits(LOGITS_TE, "softmax")
    torch.testing.assert_close(scores_TE, SOFTMAX_TE, rtol=0, atol=1e-6)
    assert probs_TE is scores_TE


def test_sigmoid_scores_are_a_distribution_for_the_loss() -> None:
    scores_TE, probs_TE = scores_from_logits(LOGITS_TE, "sigmoid")
    torch.testing.assert_close(scores_TE, 1 / (1 + torch.exp(-LOGITS_TE)))
    torch.testing.assert_close(probs_TE.sum(-1), torch.ones(3))
    torch.testing.assert_close(probs_TE * scores_TE.sum(-1, keepdim=True), scores_TE)


def test_sigmoid_scores_far_below_zero_stay_finite() -> None:
    scores_TE, probs_TE = scores_from_logits(torch.full((1, 4), -200.0), "sigmoid")
    assert torch.equal(scores_TE, torch.zeros(1, 4))
    assert probs_TE.isfinite().all()


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
