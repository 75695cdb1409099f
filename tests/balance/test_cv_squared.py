"""The importance loss: the golden value, the reference, and its gradient, which is not of a sum over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moelora.balance.cv_squared import cv_squared
from moelora.ops import reference_options
from moelora.selection.dense import Dense
from tests.balance.layers import CV_SQUARED, ROUTINGS, Layers, loss_of, record
from tests.routing.golden import golden_routing
from tests.training.runs import one_step


def test_golden() -> None:
    """The unbiased variance of the summed softmax by its squared mean, as in LoRAMoE's code, on the golden logits."""
    assert loss_of(CV_SQUARED, record(golden_routing(Dense()))).item() == pytest.approx(0.0280332, abs=1e-7)


@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_reference(name: str) -> None:
    layers = Layers.routed(name)
    records = layers.records()
    found = loss_of(CV_SQUARED, *records)
    expected = torch.stack([reference_options.cv_squared_loss(r.routing.gates_TE(), r.valid_T) for r in records]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_balance_is_zero_and_one_expert_has_none() -> None:
    assert cv_squared(torch.full((5,), 3.0)).item() == 0
    assert cv_squared(torch.tensor([4.0])).item() == 0
    assert cv_squared(torch.tensor([2.0, 0.0])).item() == pytest.approx(2.0)


@pytest.mark.parametrize("settings", [{"batch": 1, "accumulate": 4}, {"batch": 2, "accumulate": 2}], ids=str)
def test_accumulation_changes_nothing(settings: dict[str, Any]) -> None:
    words = {"balance": {"kind": "cv_squared", "coef": 1.0}}
    whole, parts = one_step("molora", words=words), one_step("molora", words=words, **settings)
    assert parts.logs[0]["balance_loss"] == pytest.approx(whole.logs[0]["balance_loss"], rel=1e-4)
    for name, grad in whole.gradients[0].items():
        torch.testing.assert_close(parts.gradients[0][name], grad, rtol=1e-3, atol=2e-6)
