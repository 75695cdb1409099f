"""The mixture of DoRAs equals its reference, forward and every gradient.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.ops import reference
from moelora.ops.dora import Dora, dora_feed_forward, dora_linear, weight_norms
from moelora.ops.factors import Factors
from tests.ops.compare import assert_close, gradients
from tests.ops.feed_forward_case import ROLES, Case


def compare(fast: Callable[[], Tensor], naive: Callable[[], Tensor], leaves: dict[str, Tensor]) -> None:
    found, expected = gradients(fast, leaves), gradients(naive, leaves)
    for name, tensor in expected.items():
        assert_close(name, found[name], tensor, rtol=1e-4, atol=2e-5 * max(1.0, float(tensor.abs().max())))


def of_case(case: Case) -> dict[str, Dora]:
    """Experts with magnitudes beside a case's factors; the magnitudes become leaves of the case."""
    experts = {}
    for role, factors in case.factors.items():
        linear = case.linears[role]
        magnitude_EO = (torch.rand(factors.num_experts, linear.out_features) + 0.5).requires_grad_()
        case.leaves[f"{role}_m"] = magnitude_EO
        experts[role] = Dora(factors, magnitude_EO, linear.weight, linear.bias)
    return experts


@pytest.mark.parametrize("E", [1, 4])
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("routed", [False, True], ids=["alone", "routed"])
def test_dora_linear(E: int, bias: bool, routed: bool) -> None:
    if not routed and E > 1:
        pytest.skip("a linear without a router has one expert")
    linear = nn.Linear(13, 9, bias=bias).requires_grad_(False)
    x_TD = torch.randn(7, 13).requires_grad_()
    a_ERD, b_EOR = torch.randn(E, 3, 13).requires_grad_(), torch.randn(E, 9, 3).requires_grad_()
    magnitude_EO = (torch.rand(E, 9) + 0.5).requires_grad_()
    leaves = {"x": x_TD, "a": a_ERD, "b": b_EOR, "m": magnitude_EO}
    gates_TE = None
    if routed:
        gates_TE = torch.where(torch.rand(7, E) < 0.6, torch.rand(7, E), 0.0).requires_grad_()
        leaves["gates"] = gates_TE
    dora = Dora(Factors(a_ERD, b_EOR, 0.7), magnitude_EO, linear.weight, linear.bias)

    def naive() -> Tensor:
        more_TO = reference.dora_linear(x_TD, linear.weight, a_ERD, b_EOR, magnitude_EO, gates_TE, 0.7)
        return linear(x_TD) + more_TO

    compare(lambda: dora_linear(x_TD, linear(x_TD), dora, gates_TE), naive, leaves)


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    "words",
    [
        {"T": 1, "E": 1, "K": 1},
        {"T": 7, "E": 3, "K": 1},
        {"T": 7, "E": 5, "K": 2},
        {"T": 7, "E": 3, "K": None},
        {"T": 7, "E": 3, "K": 2, "renormalize": True, "bias": True},
        {"T": 7, "E": 3, "K": 2, "roles": ("up",)},
        {"T": 7, "E": 3, "K": 2, "roles": ("down",)},
    ],
    ids=str,
)
def test_dora_feed_forward(kind: str, words: dict[str, Any]) -> None:
    case = Case(kind, **words)
    experts = of_case(case)

    def naive() -> Tensor:
        linears = {role: (linear.weight, linear.bias) for role, linear in case.linears.items()}
        loras = {role: (f.a_ERD, f.b_EOR, f.scaling) for role, f in case.factors.items()}
        magnitudes = {role: dora.magnitude_EO for role, dora in experts.items()}
        gates_TE = case.routing().gates_TE()
        return reference.mixture_feed_forward(
            case.leaves["x"], gates_TE, linears, loras, case.kind, case.activation, magnitudes
        )

    compare(lambda: dora_feed_forward(case.leaves["x"], case.routing(), case.block(), experts), naive, case.leaves)


@pytest.mark.parametrize("scale", [1.0, 1e-4, 300.0])
def test_norms_without_the_sum_of_the_weights(scale: float) -> None:
    weight_OD = torch.randn(20, 33)
    factors = Factors(torch.randn(4, 3, 33) * scale, torch.randn(4, 20, 3), 1.7)
    sums_EOD = weight_OD + 1.7 * factors.b_EOR @ factors.a_ERD
    torch.testing.assert_close(weight_norms(weight_OD, factors), sums_EOD.norm(dim=-1), rtol=1e-5, atol=1e-6)
    nothing = Factors(factors.a_ERD, torch.zeros(4, 20, 3), 1.7)
    assert torch.equal(weight_norms(weight_OD, nothing), weight_norms(weight_OD).expand(4, -1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ROLES)
def test_with_b_of_zero_it_is_the_frozen_block_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    case = Case(kind, T=33, E=4, K=2, renormalize=True, bias=True, dtype=dtype, expert_dtype=torch.float32)
    experts = {}
    for role, factors in case.factors.items():
        factors.b_EOR.data.zero_()
        linear = case.linears[role]
        experts[role] = Dora(factors, weight_norms(linear.weight).expand(4, -1), linear.weight, linear.bias)
    found = dora_feed_forward(case.leaves["x"], case.routing(), case.block(), experts)
    if dtype == torch.bfloat16:
        assert torch.equal(found, case.frozen())
    else:  # weights whose sum is 1 up to a rounding
        torch.testing.assert_close(found, case.frozen(), rtol=1e-6, atol=1e-6)


def test_a_row_of_zeros_stays_what_it_is() -> None:
    """PEFT's DoRA divides 0 by 0 there."""
    weight_OD = torch.randn(5, 7)
    weight_OD[2] = 0
    factors = Factors(torch.randn(1, 2, 7), torch.zeros(1, 5, 2), 1.0)
    dora = Dora(factors, weight_norms(weight_OD)[None], weight_OD, None)
    x_TD = torch.randn(3, 7)
    y_TO = F.linear(x_TD, weight_OD)
    assert torch.equal(dora_linear(x_TD, y_TO, dora, None), y_TO)


def test_what_one_pass_over_the_last_linear_would_lose() -> None:
    """With factors of rows `sum_k w_k c_k W2 a_k` is no product of `sum_k w_k a_k`: each choice has its own."""
    case = Case("plain", T=9, E=3, K=2, bias=False)
    experts = of_case(case)
    passes: list[int] = []
    handle = case.linears["down"].register_forward_hook(lambda module, inputs, output: passes.append(len(inputs[0])))
    found = dora_feed_forward(case.leaves["x"], case.routing(), case.block(), experts)
    handle.remove()
    assert passes == [9, 9]
    assert (found - case.fast()).abs().max() > 1e-2


def test_dropout_acts_as_in_pefts_dora() -> None:
    """Of a linear `W x + b + (c - 1) W x' + c s B A x'`, x' what dropout leaves: here a factor of each feature."""
    case = Case("gated", T=5, E=1, K=None, bias=True)
    experts = of_case(case)
    case.leaves["weights"].data.fill_(1.0)

    def dropped(x: Tensor) -> Tensor:
        return x * torch.linspace(0, 2, x.shape[-1])

    def linear(role: str, x: Tensor) -> Tensor:
        dora, module = experts[role], case.linears[role]
        v_OD = module.weight + dora.factors.scaling * dora.factors.b_EOR[0] @ dora.factors.a_ERD[0]
        y = dora.magnitude_EO[0] / v_OD.detach().norm(dim=1) * F.linear(dropped(x), v_OD)
        return module(x) + y - F.linear(dropped(x), module.weight)

    def naive() -> Tensor:
        x_TD = case.leaves["x"]
        return linear("down", case.activation(linear("gate", x_TD)) * linear("up", x_TD)) * case.leaves["weights"]

    def fast() -> Tensor:
        return dora_feed_forward(case.leaves["x"], case.routing(), case.block(), experts, dropped)

    compare(fast, naive, case.leaves)
