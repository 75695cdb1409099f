"""The entropy of the router as a loss: by hand, and the reference."""

from __future__ import annotations

import math

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.errors import ConfigError
from moelora.ops import reference_options
from moelora.selection.dense import Dense
from tests.balance.layers import ENTROPY, Layers, loss_of, record
from tests.routing.golden import LOGITS_TE, SOFTMAX_TE, golden_routing, router_of
from tests.routing.routers import every_token
from tests.training.runs import one_step


def test_golden() -> None:
    """`-sum p log p` of the golden probabilities of each token, by hand with math.log."""
    expected = sum(-p * math.log(p) for row in SOFTMAX_TE.tolist() for p in row) / 3
    assert loss_of(ENTROPY, record(golden_routing(Dense()))).item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("name", ["top-2", "top-1-raw", "dense", "capacity", "learned-threshold"])
def test_equals_the_reference(name: str) -> None:
    layers = Layers.routed(name)
    records = layers.records()
    found = loss_of(ENTROPY, *records)
    expected = torch.stack([reference_options.entropy_loss(r.routing.probs_TE, r.valid_T) for r in records]).mean()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for grad, wanted in zip(layers.gradients(found), layers.gradients(expected), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-6)


def test_where_nothing_is_known_and_where_all_is() -> None:
    unknown = router_of(Dense())(torch.zeros(3, 4), every_token(1, 3))
    assert loss_of(ENTROPY, record(unknown)).item() == pytest.approx(math.log(4))
    logits_TE = torch.tensor([[900.0, 0.0, 0.0, -900.0]]).requires_grad_()
    certain = record(router_of(Dense())(logits_TE, every_token(1, 1)))
    loss = loss_of(ENTROPY, certain)
    assert loss.item() == 0
    (grad,) = torch.autograd.grad(loss, logits_TE)
    assert not grad.any()


def test_experts_that_are_off_have_none() -> None:
    router = router_of(Dense())
    router.on = (0, 1)
    loss = loss_of(ENTROPY, record(router(LOGITS_TE, every_token(1, 3))))
    pairs = LOGITS_TE[:, :2].softmax(-1)
    assert loss.item() == pytest.approx(float(-(pairs * pairs.log()).sum(-1).mean()))


def test_it_stands_beside_a_balance_loss_and_is_logged() -> None:
    words = {"balance": [{"kind": "switch", "coef": 0.01}, {"kind": "entropy", "coef": 0.1}]}
    log = one_step("mixlora_dynamic", words=words).logs[0]
    assert 0 < log["entropy_loss"] <= math.log(4)
    assert log["balance_loss"] > 0


def test_scores_that_are_no_probabilities_are_refused() -> None:
    with pytest.raises(ConfigError, match="allowed: scores that are probabilities"):
        MoeLoraConfig.from_preset("smora", balance=["entropy"])
