"""The mixture of feed-forward experts equals its reference, forward and every gradient.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora.ops import compiled_kernels as compiled_kernels_module
from moelora.ops import reference
from moelora.ops import segments as segments_module
from moelora.ops.activation_vjp import activation_vjp
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.mixture_feed_forward import Form, choose_form, mixture_feed_forward
from moelora.routing.decision import Routing
from tests.ops.compare import assert_close, assert_near, gradients

SCALINGS = {"up": 1.3, "gate": 0.7, "down": 1.1}


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The loops of the fused form run as they are, but in the tests of the compiler."""
    if "compiler" not in request.node.name:
        monkeypatch.setattr(compiled_kernels_module._Compiled, "failure", "not in this test")


ROLES = {"gated": ("gate", "up", "down"), "plain": ("up", "down"), "fused": ("up", "down")}


class Case:
    """A frozen block, its experts, tokens and their routing, computable by the fast operation and by the reference."""

    def __init__(
        self,
        kind: str,
        *,
        T: int = 7,
        D: int = 12,
        F: int = 20,
        E: int = 3,
        R: int = 3,
        K: int | None = 2,
        roles: tuple[str, ...] | None = None,
        activation: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        renormalize: bool = False,
    ) -> None:
        bias = kind != "gated"
        sizes = {"gate": (D, F), "up": (D, 2 * F if kind == "fused" else F), "down": (F, D)}
        self.kind = kind
        self.activation = activation or nn.SiLU()
        self.linears = {role: nn.Linear(*sizes[role], bias=bias).to(dtype) for role in ROLES[kind]}
        for linear in self.linears.values():
            linear.requires_grad_(False)
        self.factors: dict[str, Factors] = {}
        self.leaves: dict[str, Tensor] = {"x": torch.randn(T, D).to(dtype).requires_grad_()}
        for role in ROLES[kind] if roles is None else roles:
            inputs, outputs = sizes[role]
            a_ERD = (torch.randn(E, R, inputs) * 0.5).to(dtype).requires_grad_()
            b_EOR = (torch.randn(E, outputs, R) * 0.5).to(dtype).requires_grad_()
            self.factors[role] = Factors(a_ERD, b_EOR, SCALINGS[role])
            self.leaves |= {f"{role}_a": a_ERD, f"{role}_b": b_EOR}
        chosen = E if K is None else K
        weights_TK = torch.rand(T, chosen) + 0.1
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        self.leaves["weights"] = weights_TK.requires_grad_()
        self.ids_TK = None if K is None else torch.rand(T, E).topk(K).indices
        self.kept_TK = torch.ones(T, chosen)
        self.scores_TE = torch.rand(T, E)
        self.dropout: Callable[[Tensor], Tensor] = nn.Identity()

    def routing(self) -> Routing:
        return Routing(self.scores_TE, self.scores_TE, self.leaves["weights"] * self.kept_TK, self.ids_TK)

    def forms(self) -> tuple[Form, ...]:
        if self.ids_TK is None:
            return ("masked",)
        known = activation_vjp(self.activation).vjp is not None
        return ("gathered", "segments", "masked", *(("compiled",) if known else ()))

    def block(self) -> FrozenFeedForward:
        return FrozenFeedForward(
            kind=self.kind,
            up=self.linears["up"],
            down=self.linears["down"],
            activation=self.activation,
            gate=self.linears.get("gate"),
            down_bias=self.linears["down"].bias,
        )

    def fast(self, form: Form | None = None) -> Tensor:
        experts = FeedForwardExperts(
            up=self.factors.get("up"),
            down=self.factors.get("down"),
            gate=self.factors.get("gate"),
            dropout=self.dropout,
        )
        return mixture_feed_forward(self.leaves["x"], self.routing(), self.block(), experts, form)

    def naive(self) -> Tensor:
        linears = {role: (linear.weight, linear.bias) for role, linear in self.linears.items()}
        loras = {role: (f.a_ERD, f.b_EOR, f.scaling) for role, f in self.factors.items()}
        return reference.mixture_feed_forward(
            self.leaves["x"], self.routing().gates_TE(), linears, loras, self.kind, self.activation
        )

    def check(self, rtol: float = 1e-5) -> None:
        naive = gradients(self.naive, self.leaves)
        for form in self.forms():
            fast = gradients(partial(self.fast, form), self.leaves)
            for name, expected in naive.items():
                atol = rtol * float(expected.abs().max())
                assert_close(f"{form}: {name}", fast[name], expected, rtol=rtol, atol=atol)


def case_id(value: Any) -> str | None:
    return "-".join(f"{k}{v}" for k, v in value.items()) if isinstance(value, dict) else None


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    "sizes",
    [
        {"T": 1, "E": 1, "R": 1, "K": 1},
        {"T": 1, "E": 8, "R": 3, "K": 2},
        {"T": 7, "E": 3, "R": 1, "K": 1},
        {"T": 7, "E": 3, "R": 3, "K": 3},
        {"T": 7, "E": 8, "R": 16, "K": 5},
        {"T": 7, "E": 3, "R": 3, "K": None},
        {"T": 7, "E": 1, "R": 3, "K": None},
        {"T": 63, "E": 8, "R": 3, "K": 2},
    ],
    ids=case_id,
)
def test_mixture_feed_forward(kind: str, sizes: dict[str, Any]) -> None:
    Case(kind, **sizes).check()


@pytest.mark.parametrize("kind", ROLES)
def test_segments_longer_than_a_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments_module, "ALIGNMENT", 4)
    monkeypatch.setattr(segments_module, "MAX_ROWS", 8)
    Case(kind, T=63, E=3, K=2).check()


@pytest.mark.parametrize(
    ("kind", "roles"),
    [
        ("gated", ("gate",)),
        ("gated", ("up",)),
        ("gated", ("down",)),
        ("gated", ("gate", "up")),
        ("gated", ("gate", "down")),
        ("gated", ("up", "down")),
        ("plain", ("up",)),
        ("plain", ("down",)),
        ("fused", ("up",)),
        ("fused", ("down",)),
    ],
)
@pytest.mark.parametrize("K", [2, None])
def test_experts_on_some_linears_only(kind: str, roles: tuple[str, ...], K: int | None) -> None:
    Case(kind, K=K, roles=roles).check()


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    "activation", [nn.GELU(approximate="tanh"), nn.ReLU(), nn.Tanh()], ids=lambda a: type(a).__name__
)
def test_other_activations(kind: str, activation: nn.Module) -> None:
    Case(kind, activation=activation).check()


@pytest.mark.parametrize("kind", ROLES)
def test_other_widths(kind: str) -> None:
    Case(kind, D=36, F=52, E=8, R=16).check()
    Case(kind, D=5, F=3, E=3, R=1).check()


@pytest.mark.parametrize("kind", ROLES)
def test_dropped_choices(kind: str) -> None:
    """A choice past the capacity has weight 0: it adds nothing and its weight gets no gradient through the drop."""
    case = Case(kind, T=7, E=3, K=2)
    case.kept_TK[[0, 3, 3, 5], [1, 0, 1, 0]] = 0
    case.check()
    found = gradients(case.fast, case.leaves)
    assert found["output"][3].abs().max() == 0  # without renormalisation the base block is scaled as well (I4)
    assert found["weights"][3].abs().max() == 0


@pytest.mark.parametrize("kind", ROLES)
def test_with_b_of_zero_and_weights_of_sum_one_it_is_the_frozen_block(kind: str) -> None:
    case = Case(kind, renormalize=True)
    for factors in case.factors.values():
        factors.b_EOR.data.zero_()
    up = case.linears["up"](case.leaves["x"])
    if kind == "gated":
        hidden = case.activation(case.linears["gate"](case.leaves["x"])) * up
    elif kind == "fused":
        gate_half, up_half = up.chunk(2, dim=-1)
        hidden = case.activation(gate_half) * up_half
    else:
        hidden = case.activation(up)
    torch.testing.assert_close(case.fast(), case.linears["down"](hidden), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_the_bias_of_down_is_scaled_by_the_sum_of_the_weights(kind: str) -> None:
    case = Case(kind)
    with_bias = case.fast()
    bias_D = case.linears["down"].bias.data.clone()
    case.linears["down"].bias.data.zero_()
    torch.testing.assert_close(
        with_bias - case.fast(), case.leaves["weights"].sum(-1, keepdim=True) * bias_D, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [2, None])
def test_an_expert_without_tokens_has_a_zero_gradient(kind: str, K: int | None) -> None:
    case = Case(kind, E=3, K=K)
    if case.ids_TK is None:
        case.kept_TK[:, 1] = 0
    else:
        case.ids_TK = torch.tensor([[0, 2]]).repeat(7, 1)
    found = gradients(case.fast, case.leaves)
    for role in ROLES[kind]:
        for factor in ("a", "b"):
            assert found[f"{role}_{factor}"][1].abs().max() == 0, role
            assert found[f"{role}_{factor}"][0].abs().max() > 0, role


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [2, None])
def test_half_precision(kind: str, K: int | None) -> None:
    case = Case(kind, T=63, E=8, K=K, dtype=torch.bfloat16)
    fast, naive = gradients(case.fast, case.leaves), gradients(case.naive, case.leaves)
    assert fast["output"].dtype == torch.bfloat16
    assert fast["weights"].dtype == torch.float32
    for name, expected in naive.items():
        assert_near(name, fast[name], expected, 3e-2)


@pytest.mark.parametrize("kind", ROLES)
def test_autocast(kind: str) -> None:
    case = Case(kind, T=63, E=8)

    def fast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.fast()

    found, naive = gradients(fast, case.leaves), gradients(case.naive, case.leaves)
    for name, expected in naive.items():
        assert_near(name, found[name], expected, 3e-2)


@pytest.mark.parametrize("kind", ROLES)
def test_experts_in_fp32_on_a_frozen_block_in_bf16(kind: str) -> None:
    """PEFT's default: `autocast_adapter_dtype` keeps the adapter in fp32."""
    case = Case(kind, T=63, E=8)
    for linear in case.linears.values():
        linear.to(torch.bfloat16)
    case.leaves["x"] = case.leaves["x"].detach().bfloat16().requires_grad_()
    fast, naive = gradients(case.fast, case.leaves), gradients(case.naive, case.leaves)
    for name, expected in naive.items():
        assert_near(name, fast[name], expected, 3e-2)


def test_gradients_without_the_input() -> None:
    """The first layer's input is frozen: no gradient to it, all others as before."""
    case = Case("gated")
    full = gradients(case.fast, case.leaves)
    case.leaves["x"] = case.leaves["x"].detach()
    trained = {name: leaf for name, leaf in case.leaves.items() if name != "x"}
    found = gradients(case.fast, trained)
    for name, expected in full.items():
        if name != "x":
            assert_close(name, found[name], expected, rtol=1e-6, atol=1e-6)


def test_gradients_with_frozen_weights() -> None:
    """A frozen router: the weights of the experts need no gradient."""
    case = Case("gated")
    full = gradients(case.fast, case.leaves)
    case.leaves["weights"] = case.leaves["weights"].detach()
    found = gradients(case.fast, {name: leaf for name, leaf in case.leaves.items() if name != "weights"})
    for name, actual in found.items():
        assert_close(name, actual, full[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ROLES)
def test_no_graph_gives_the_same_output(kind: str) -> None:
    case = Case(kind)
    with torch.no_grad():
        plain = case.fast()
    torch.testing.assert_close(case.fast().detach(), plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ROLES)
def test_dropout_of_zero_is_no_dropout(kind: str) -> None:
    case = Case(kind)
    without = gradients(case.fast, case.leaves)
    case.dropout = nn.Dropout(0.0)
    for name, found in gradients(case.fast, case.leaves).items():
        assert torch.equal(found, without[name]), name


def test_dropout_draws_by_the_seed() -> None:
    case = Case("gated")
    case.dropout = nn.Dropout(0.4)
    torch.manual_seed(1)
    first = gradients(case.fast, case.leaves)
    torch.manual_seed(1)
    again = gradients(case.fast, case.leaves)
    other = gradients(case.fast, case.leaves)
    for name in first:
        assert torch.equal(first[name], again[name]), name
    assert not torch.allclose(first["output"], other["output"])


@pytest.mark.parametrize("roles", [("up",), ("down",), ("up", "down")], ids="-".join)
def test_dropout_keeps_the_expectation(roles: tuple[str, ...]) -> None:
    """With a linear activation the mean over the draws is the output without dropout."""
    repeats = 4000
    case = Case("plain", T=2, roles=roles, activation=nn.Identity())
    exact = case.fast().detach()
    for name in ("x", "weights"):
        case.leaves[name] = case.leaves[name].detach().repeat_interleave(repeats, 0)
    assert case.ids_TK is not None
    case.ids_TK = case.ids_TK.repeat_interleave(repeats, 0)
    case.kept_TK = case.kept_TK.repeat_interleave(repeats, 0)
    case.scores_TE = case.scores_TE.repeat_interleave(repeats, 0)
    case.dropout = nn.Dropout(0.4)
    draws = case.fast().detach().view(2, repeats, -1)
    deviation = draws.std(1)
    assert deviation.min() > 0
    assert ((draws.mean(1) - exact).abs() < 4.5 * deviation / repeats**0.5).all()


@pytest.mark.parametrize("kind", ROLES)
def test_gradients_under_dropout_are_those_of_what_was_computed(kind: str) -> None:
    """Finite differences with the same draw: a backward that forgets or redraws the mask fails."""
    case = Case(kind, T=3, D=4, F=5, R=2, dtype=torch.float64, activation=nn.Tanh())
    case.leaves["weights"] = case.leaves["weights"].detach().double().requires_grad_()
    case.scores_TE, case.kept_TK = case.scores_TE.double(), case.kept_TK.double()
    case.dropout = nn.Dropout(0.4)

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return case.fast()

    assert torch.autograd.gradcheck(function, tuple(case.leaves.values()), atol=1e-6)


def test_the_blocks_own_dropouts_are_applied() -> None:
    case = Case("plain", roles=())
    block = FrozenFeedForward(
        kind="plain",
        up=case.linears["up"],
        down=case.linears["down"],
        activation=case.activation,
        down_bias=case.linears["down"].bias,
        hidden_dropout=lambda hidden: hidden * 2,
        output_dropout=lambda output: output * 3,
    )
    experts = FeedForwardExperts(up=None, down=None, gate=None, dropout=nn.Identity())
    routing = replace(case.routing(), weights_TK=torch.full((7, 2), 0.5))
    hidden = case.activation(case.linears["up"](case.leaves["x"])) * 2
    expected = case.linears["down"](hidden) * 3
    torch.testing.assert_close(
        mixture_feed_forward(case.leaves["x"], routing, block, experts), expected, rtol=1e-5, atol=1e-5
    )


IGNORED = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@IGNORED
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_compiler_gives_the_reference(kind: str) -> None:
    """The real compiler; each kind at two lengths, of which the second takes the code made for the first."""
    for tokens in (63, 96):
        case = Case(kind, T=tokens, E=8, R=3, K=2)
        fast, naive = gradients(partial(case.fast, "compiled"), case.leaves), gradients(case.naive, case.leaves)
        for name, expected in naive.items():
            atol = 1e-5 * float(expected.abs().max())
            assert_close(name, fast[name], expected, rtol=1e-5, atol=atol)
    assert compiled_kernels_module.compiler_works()


def test_a_broken_compiler_is_said_and_the_result_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(compiled_kernels_module._Compiled, "failure", None)
    monkeypatch.setattr(torch, "compile", broken)
    compiled_kernels_module._loops.cache_clear()
    case = Case("gated", T=63, E=3)
    with pytest.warns(RuntimeWarning, match=r"does not work here \(RuntimeError: no C\+\+ compiler was found\)"):
        actual = case.fast("compiled")
    assert_close("y", actual, case.naive(), rtol=1e-5, atol=1e-5)
    assert not compiled_kernels_module.compiler_works()
    chosen = choose_form(63, case.routing(), case.block(), torch.device("cpu"), compiled=True)
    assert chosen == "segments"


def test_compiled_operations_are_chosen_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_kernels_module._Compiled, "failure", None)
    case, cpu = Case("gated", T=63, E=3), torch.device("cpu")
    assert choose_form(63, case.routing(), case.block(), cpu) == "segments"
    assert choose_form(63, case.routing(), case.block(), cpu, compiled=True) == "compiled"
    unknown = Case("gated", T=63, E=3, activation=nn.Tanh())
    assert choose_form(63, unknown.routing(), unknown.block(), cpu, compiled=True) == "segments"
