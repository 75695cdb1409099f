"""The router z-loss: the golden value and the reference."""

from __future__ import annotations

import pytest
import torch

from moelora.ops import reference
from tests.balance.layers import ROUTINGS, TOP_2, Layers, Z, exact, loss_of, record
from tests.routing.golden import ALL_VALID_T, LOGITS_TE, Z_LOSS, golden_routing


def test_golden() -> None:
    assert exact(loss_of(Z, record(golden_routing(TOP_2)))) == Z_LOSS
    assert exact(reference.z_loss(LOGITS_TE, ALL_VALID_T)) == Z_LOSS


@pytest.mark.parametrize("name", ROUTINGS)
def test_equals_the_reference(name: str) -> None:
    layers = Layers.routed(name)
    records = layers.records()
    found = loss_of(Z, *records)
    expected = torch.stack([reference.z_loss(r.routing.logits_TE, r.valid_T) for r in records]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)
