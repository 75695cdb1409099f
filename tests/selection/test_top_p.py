"""Top-p selection: golden values, the reference, and what it refuses.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

import pytest
import torch

from moelora import MoeLoraConfig
from moelora.balance.mixtral import MixtralBalance
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.selection.top_p import TopP
from tests.balance.layers import exact, loss_of, record
from tests.routing.golden import DYNAMIC_AUX, DYNAMIC_IDS, DYNAMIC_WEIGHTS, LOGITS_TE, golden_routing
from tests.routing.routers import new_router, select


def test_golden() -> None:
    routing = golden_routing(TopP(p=0.8))
    assert routing.ids_TK is not None
    assert routing.assigned_TK is not None
    assert not routing.sums_to_one
    for t in range(3):
        kept = routing.assigned_TK[t]
        assert routing.ids_TK[t][kept].tolist() == DYNAMIC_IDS[t]
        torch.testing.assert_close(routing.weights_TK[t][kept], torch.tensor(DYNAMIC_WEIGHTS[t]), rtol=0, atol=1e-6)
        assert torch.equal(routing.weights_TK[t][~kept], torch.zeros(int((~kept).sum())))


def test_golden_loss() -> None:
    assert exact(loss_of(MixtralBalance(coef=1.0), record(golden_routing(TopP(p=0.8))))) == DYNAMIC_AUX


def test_the_one_that_crosses_p_is_kept() -> None:
    probs_TE = torch.tensor([[0.5, 0.2, 0.2, 0.1]])
    assert select(TopP(p=0.6), probs_TE).gates_TE().tolist() == [pytest.approx([0.5, 0.2, 0.0, 0.0])]
    assert select(TopP(p=0.4), probs_TE).gates_TE().tolist() == [pytest.approx([0.5, 0.0, 0.0, 0.0])]
    assert select(TopP(p=1.0), probs_TE).gates_TE().tolist() == [pytest.approx([0.5, 0.2, 0.2, 0.1])]


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8, 1.0])
@pytest.mark.parametrize("divide", [False, True], ids=["raw", "renormalized"])
def test_equals_the_reference(p: float, divide: bool) -> None:
    """Forward and the gradient of the logits."""
    logits_TE = torch.randn(23, 7, requires_grad=True)
    routing = select(TopP(p=p, renormalize=divide), logits_TE.softmax(-1))
    expected_TE = reference.softmax_top_p(logits_TE, p, divide)
    torch.testing.assert_close(routing.gates_TE(), expected_TE, rtol=1e-5, atol=1e-6)
    upstream_TE = torch.randn(23, 7)
    (found,) = torch.autograd.grad(routing.gates_TE(), logits_TE, upstream_TE)
    (wanted,) = torch.autograd.grad(expected_TE, logits_TE, upstream_TE)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-6)
    assert torch.equal(routing.load_TE() > 0, expected_TE > 0)


def test_no_token_keeps_more_columns_than_one_needs() -> None:
    few = golden_routing(TopP(p=0.1))
    assert few.num_choices == 1
    assert select(TopP(p=0.8), LOGITS_TE[:0].softmax(-1)).gates_TE().shape == (0, 4)


def test_bad_combinations() -> None:
    for word in ("capacity", "capacity_factor"):
        with pytest.raises(ConfigError, match=f"'top_p' has no {word}: a capacity counts first choices"):
            MoeLoraConfig(selection={"kind": "top_p", word: 2})
    with pytest.raises(ConfigError, match="'top_p' sums probabilities"):
        MoeLoraConfig(selection="top_p", scores={"kind": "linear", "activation": "sigmoid"})


def test_a_router_of_it_has_no_tensor_but_its_scores() -> None:
    assert list(new_router(TopP()).pieces) == ["weight"]
