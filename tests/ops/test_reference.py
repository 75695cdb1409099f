"""The references run on whatever device their inputs are, and on no tokens at all."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from moelora.ops import reference

T, D, E, R, K = 5, 4, 3, 2, 2
LINEARS: dict[str, tuple[Tensor, Tensor | None]] = {
    role: (torch.ones(D, D) / D, torch.ones(D)) for role in ("gate", "up", "down")
}
LORAS = {role: (torch.ones(E, R, D), torch.ones(E, D, R), 0.5) for role in LINEARS}
VALID_T = torch.tensor([True, True, False, True, True])


def feed_forward(x_TD: Tensor, kind: str = "gated") -> Tensor:
    gates_TE = torch.linspace(0, 1, E, device=x_TD.device).expand(len(x_TD), -1)
    return reference.mixture_feed_forward(x_TD, gates_TE, LINEARS, LORAS, kind, nn.SiLU())


def linear(x_TD: Tensor) -> Tensor:
    gates_TE = torch.ones(len(x_TD), E, device=x_TD.device)
    return reference.mixture_linear(x_TD, *LORAS["up"][:2], gates_TE, 0.5)


def balance(x_TD: Tensor) -> Tensor:
    return reference.switch_balance_loss(x_TD[:, :E].softmax(-1), (x_TD[:, :E] > 0).float(), VALID_T)


def pooled_balance(x_TD: Tensor) -> Tensor:
    return reference.mixtral_balance_loss(x_TD[None, :, :E], K, VALID_T)


def z_loss(x_TD: Tensor) -> Tensor:
    return reference.z_loss(x_TD, VALID_T)


def top_k(x_TD: Tensor) -> Tensor:
    weights_TK, ids_TK = reference.softmax_top_k(x_TD, K, renormalize=True)
    return weights_TK + ids_TK


def sigmoid_top_k(x_TD: Tensor) -> Tensor:
    weights_TK, ids_TK = reference.sigmoid_top_k(x_TD, x_TD[0], K)
    return weights_TK + ids_TK


def bias_update(x_TD: Tensor) -> Tensor:
    return reference.bias_update(x_TD[0], x_TD[:, :E].topk(K).indices, 0.1)


def capacity(x_TD: Tensor) -> Tensor:
    ids_BSK = x_TD[:, :E].topk(K).indices[None]
    return reference.capacity_kept(ids_BSK, E, 0.5, VALID_T[None])


@pytest.mark.parametrize(
    "function",
    [feed_forward, linear, balance, pooled_balance, z_loss, top_k, sigmoid_top_k, bias_update, capacity],
    ids=lambda function: function.__name__,
)
def test_new_tensors_are_made_on_the_device_of_the_inputs(function: Callable[[Tensor], Tensor]) -> None:
    """With another default device, a tensor made without saying where would meet the inputs as a stranger."""
    x_TD = torch.randn(T, D)
    expected = function(x_TD)
    with torch.device("meta"):
        actual = function(x_TD)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("function", [feed_forward, linear], ids=lambda function: function.__name__)
def test_no_tokens(function: Callable[[Tensor], Tensor]) -> None:
    assert function(torch.randn(0, D)).shape == (0, D)


def test_a_capacity_is_that_of_the_factor_as_it_is_written() -> None:
    """0.1 * 3 * 10 / 3 is 1; in floating point it is 1.0000000000000002, and its ceiling 2."""
    ids_BSK = torch.zeros(1, 10, 3, dtype=torch.long)
    kept_BSK = reference.capacity_kept(ids_BSK, 3, 0.1, torch.ones(1, 10, dtype=torch.bool))
    assert int(kept_BSK.sum()) == 1
