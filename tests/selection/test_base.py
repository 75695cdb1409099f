"""Renormalising the weights of the chosen experts."""

from __future__ import annotations

import torch

from moelora.selection.base import renormalize


def test_renormalising_nothing_gives_nothing() -> None:
    weights_TK = torch.zeros(2, 3, requires_grad=True)
    result = renormalize(weights_TK)
    assert torch.equal(result, torch.zeros(2, 3))
    result.sum().backward()
    assert weights_TK.grad is not None
    assert weights_TK.grad.isfinite().all()


def test_renormalising_a_negative_sum_is_a_division_too() -> None:
    """SMoRA's biased scores can be negative; a sum clamped from below would blow them up."""
    weights_TK = torch.tensor([[-0.1, -0.3], [0.1, -0.2]])
    expected = weights_TK / weights_TK.sum(-1, keepdim=True)
    torch.testing.assert_close(renormalize(weights_TK), expected)
