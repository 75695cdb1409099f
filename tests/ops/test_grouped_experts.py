"""The form that accelerators get: what it keeps, and that it reads nothing back.

That it equals the reference, forward and every gradient, is in `test_mixture_feed_forward`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from torch import Tensor, nn

from tests.ops.feed_forward_case import ROLES, Case


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [2, None])
def test_it_keeps_the_shared_products_alone(kind: str, K: int | None) -> None:
    """What the experts make of them, and the masks, are made again: no tensor of [T * K, F] is kept."""
    case = Case(kind, T=63, F=52, E=8, K=K)
    case.dropout = nn.Dropout(0.4)
    y_TD, num_wide = case.kept_wide("grouped")
    assert num_wide == (2 if kind == "gated" else 1)
    nodes: list[Any] = [y_TD.grad_fn]
    while nodes:
        node = nodes.pop()
        assert not any(isinstance(value, Tensor) for value in getattr(node, "__dict__", {}).values())
        nodes += [parent for parent, _ in node.next_functions if parent is not None]


def test_it_wants_a_dropout_that_it_can_draw() -> None:
    case = Case("gated")
    case.dropout = nn.Identity()
    with pytest.raises(TypeError, match=r"dropout is Identity\(\); allowed: nn.Dropout"):
        case.fast("grouped")


@pytest.mark.parametrize("kind", ROLES)
def test_meta_tensors(kind: str) -> None:
    """Nothing of it reads a value back, which a meta tensor has not got: on a GPU nothing waits."""
    case = Case(kind, T=63, E=8)
    case.dropout = nn.Dropout(0.4)
    to_meta = {name: leaf.detach().to("meta").requires_grad_() for name, leaf in case.leaves.items()}
    case.leaves = to_meta
    case.factors = {
        role: replace(factors, a_ERD=to_meta[f"{role}_a"], b_EOR=to_meta[f"{role}_b"])
        for role, factors in case.factors.items()
    }
    assert case.ids_TK is not None
    case.ids_TK, case.kept_TK, case.scores_TE = (x.to("meta") for x in (case.ids_TK, case.kept_TK, case.scores_TE))
    for linear in case.linears.values():
        linear.to("meta")
    case.fast().sum().backward()
    for name, leaf in to_meta.items():
        assert leaf.grad is not None, name
        assert leaf.grad.shape == leaf.shape, name
