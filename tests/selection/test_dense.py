"""Dense selection: all experts by their scores."""

from __future__ import annotations

import torch

from moelora.selection.dense import Dense
from tests.routing.golden import LOGITS_TE, SOFTMAX_TE, golden_routing
from tests.routing.routers import SIGMOID


def test_dense_golden() -> None:
    routing = golden_routing(Dense())
    assert routing.ids_TK is None
    assert routing.num_choices == routing.num_experts == 4
    torch.testing.assert_close(routing.gates_TE(), SOFTMAX_TE, rtol=0, atol=1e-6)


def test_renormalised_sigmoids_sum_to_one() -> None:
    raw, divided = golden_routing(Dense(), SIGMOID), golden_routing(Dense(renormalize=True), SIGMOID)
    torch.testing.assert_close(raw.gates_TE(), LOGITS_TE.sigmoid())
    torch.testing.assert_close(divided.gates_TE(), divided.probs_TE)
    assert divided.sums_to_one
    assert not raw.sums_to_one


def test_load_of_dense_routing_is_the_distribution() -> None:
    routing = golden_routing(Dense())
    assert torch.equal(routing.load_TE(), routing.probs_TE)
    assert not routing.load_TE().requires_grad
