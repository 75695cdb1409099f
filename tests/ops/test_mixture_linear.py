"""The mixture on one linear equals its reference, forward and every gradient.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, K chosen experts.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.ops import reference, triton_linear
from moelora.ops.factors import Factors
from moelora.ops.mixture_linear import mixture_linear
from moelora.ops.recomputed_linear import recomputed_linear
from tests.ops.compare import assert_close, assert_near, gradients

SCALING = 1.7


def recomputed(
    x_TD: Tensor, factors: Factors, gates_TE: Tensor | None, base_TO: Tensor | None = None, p: float = 0.0
) -> Tensor:
    """What accelerators get."""
    return recomputed_linear(x_TD, factors, gates_TE, base_TO, p)


OPERATIONS = pytest.mark.parametrize("operation", [mixture_linear, recomputed], ids=["plain", "recomputed"])


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(dtype).requires_grad_()


def factors(leaves: dict[str, Tensor]) -> Factors:
    return Factors(leaves["a"], leaves["b"], SCALING)


def sparse_gates_TE(T: int, E: int, K: int) -> Tensor:
    """Random weights of K random experts, 0 for the others; they do not sum to 1."""
    chosen_TK = torch.rand(T, E).topk(K).indices
    return torch.zeros(T, E).scatter(1, chosen_TK, torch.rand(T, K) + 0.1)


@pytest.mark.parametrize(
    ("T", "D", "O", "E", "R", "K"),
    [
        pytest.param(*sizes, id="T{}-D{}-O{}-E{}-R{}-K{}".format(*sizes))
        for sizes in [
            (1, 12, 20, 1, 1, 1),
            (1, 5, 7, 8, 3, 2),
            (7, 12, 20, 3, 3, 1),
            (7, 20, 12, 3, 16, 3),
            (7, 12, 20, 64, 1, 8),
            (63, 12, 20, 8, 1, 8),
            (63, 12, 12, 8, 3, 2),
            (63, 36, 52, 3, 16, 2),
        ]
    ],
)
@OPERATIONS
def test_mixture_linear(T: int, D: int, O: int, E: int, R: int, K: int, operation: Any) -> None:
    leaves = {"x": leaf(T, D), "a": leaf(E, R, D), "b": leaf(E, O, R)}
    gates_TE = sparse_gates_TE(T, E, K).requires_grad_()
    leaves["gates"] = gates_TE
    fast = gradients(lambda: operation(leaves["x"], factors(leaves), gates_TE), leaves)
    naive = gradients(
        lambda: reference.mixture_linear(leaves["x"], leaves["a"], leaves["b"], gates_TE, SCALING), leaves
    )
    for name, expected in naive.items():
        assert_close(name, fast[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("R", [1, 3, 16])
@pytest.mark.parametrize("leading", [(1,), (7,), (3, 7)], ids=str)
@OPERATIONS
def test_mixture_linear_unrouted(R: int, leading: tuple[int, ...], operation: Any) -> None:
    leaves = {"x": leaf(*leading, 12), "a": leaf(1, R, 12), "b": leaf(1, 20, R)}
    fast = gradients(lambda: operation(leaves["x"], factors(leaves), None), leaves)
    naive = gradients(
        lambda: reference.mixture_linear(leaves["x"].flatten(0, -2), leaves["a"], leaves["b"], None, SCALING).view(
            *leading, 20
        ),
        leaves,
    )
    for name, expected in naive.items():
        assert_close(name, fast[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("R", [1, 3])
@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@OPERATIONS
def test_mixture_linear_half_precision(R: int, autocast: bool, operation: Any) -> None:
    dtype = torch.float32 if autocast else torch.bfloat16
    leaves = {"x": leaf(63, 12, dtype=dtype), "a": leaf(8, R, 12, dtype=dtype), "b": leaf(8, 20, R, dtype=dtype)}
    leaves["gates"] = sparse_gates_TE(63, 8, 2).requires_grad_()

    def fast() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            return operation(leaves["x"], factors(leaves), leaves["gates"])

    found = gradients(fast, leaves)
    naive = gradients(
        lambda: reference.mixture_linear(leaves["x"], leaves["a"], leaves["b"], leaves["gates"], SCALING), leaves
    )
    assert found["output"].dtype == torch.bfloat16
    assert found["gates"].dtype == torch.float32
    for name, expected in naive.items():
        assert_near(name, found[name], expected, 2e-2)


@pytest.mark.parametrize("R", [1, 3])
@OPERATIONS
def test_an_expert_without_tokens_has_a_zero_gradient(R: int, operation: Any) -> None:
    leaves = {"x": leaf(7, 12), "a": leaf(3, R, 12), "b": leaf(3, 20, R)}
    gates_TE = torch.tensor([[0.4, 0.0, 0.6]]).repeat(7, 1)
    found = gradients(lambda: operation(leaves["x"], factors(leaves), gates_TE), leaves)
    for name in ("a", "b"):
        assert found[name][1].abs().max() == 0
        assert found[name][0].abs().max() > 0


def test_gates_of_zero_give_zero() -> None:
    x_TD, a_ERD, b_EOR = torch.randn(5, 12), torch.randn(3, 2, 12), torch.randn(3, 20, 2)
    assert mixture_linear(x_TD, Factors(a_ERD, b_EOR, SCALING), torch.zeros(5, 3)).abs().max() == 0


def test_the_mixture_is_the_sum_of_its_experts() -> None:
    x_TD, a_ERD, b_EOR = torch.randn(5, 12), torch.randn(3, 2, 12), torch.randn(3, 20, 2)
    gates_TE = torch.rand(5, 3)
    expected = torch.zeros(5, 20)
    for e in range(3):
        expected += gates_TE[:, e : e + 1] * SCALING * (x_TD @ a_ERD[e].t() @ b_EOR[e].t())
    fast = mixture_linear(x_TD, Factors(a_ERD, b_EOR, SCALING), gates_TE)
    naive = reference.mixture_linear(x_TD, a_ERD, b_EOR, gates_TE, SCALING)
    for actual in (fast, naive):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("E", "R"), [(3, 1), (3, 4), (8, 16)])
@pytest.mark.parametrize("with_base", [False, True], ids=["delta", "base"])
@OPERATIONS
def test_experts_that_share_their_a(E: int, R: int, with_base: bool, operation: Any) -> None:
    """HydraLoRA's form: the one A gets the gradients of all experts."""
    leaves = {"x": leaf(63, 12), "a": leaf(1, R, 12), "b": leaf(E, 20, R), "gates": torch.rand(63, E).requires_grad_()}
    if with_base:
        leaves["base"] = leaf(63, 20)
    base = leaves.get("base")

    def naive() -> Tensor:
        delta = reference.mixture_linear(leaves["x"], leaves["a"], leaves["b"], leaves["gates"], SCALING)
        return delta if base is None else delta + base

    found = gradients(lambda: operation(leaves["x"], factors(leaves), leaves["gates"], base), leaves)
    for name, expected in gradients(naive, leaves).items():
        assert_close(name, found[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_a_shared_a_is_multiplied_once() -> None:
    x_TD = torch.randn(5, 12)
    shared = Factors(torch.randn(1, 4, 12), torch.randn(3, 20, 4), SCALING)
    assert shared.inner_TER(x_TD).shape == (5, 1, 4)
    assert shared.num_experts == 3
    own = Factors(shared.expanded_a_ERD(), shared.b_EOR, SCALING)
    assert own.inner_TER(x_TD).shape == (5, 3, 4)


@pytest.mark.parametrize("shared_a", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("routed", [False, True], ids=["one", "routed"])
@OPERATIONS
def test_no_tokens(shared_a: bool, routed: bool, operation: Any) -> None:
    E = 3 if routed else 1
    leaves = {"x": leaf(0, 12), "a": leaf(1 if shared_a else E, 4, 12), "b": leaf(E, 20, 4), "base": leaf(0, 20)}
    gates_TE = None
    if routed:
        gates_TE = leaves["gates"] = torch.rand(0, E).requires_grad_()
    found = gradients(lambda: operation(leaves["x"], factors(leaves), gates_TE, leaves["base"]), leaves)
    assert found["output"].shape == (0, 20)
    for name, expected in leaves.items():
        assert torch.equal(found[name], torch.zeros_like(expected)), name


@OPERATIONS
def test_with_b_of_zero_it_is_the_frozen_linear_bit_for_bit(operation: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        base_TO = torch.randn(63, 20).to(dtype)
        experts = Factors(torch.randn(8, 4, 12).to(dtype), torch.zeros(8, 20, 4, dtype=dtype), SCALING)
        y_TO = operation(torch.randn(63, 12).to(dtype), experts, sparse_gates_TE(63, 8, 2), base_TO)
        assert torch.equal(y_TO, base_TO)


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is (deprecated|not supported):DeprecationWarning")
def test_tracing_gives_the_same_at_other_sizes() -> None:
    experts = Factors(torch.randn(3, 4, 12), torch.randn(3, 20, 4), SCALING)
    with torch.no_grad():
        example = (torch.randn(5, 12), torch.rand(5, 3))
        traced = torch.jit.trace(lambda x, gates: mixture_linear(x, experts, gates), example, check_trace=False)
        for T in (5, 1, 63):
            x_TD, gates_TE = torch.randn(T, 12), torch.rand(T, 3)
            torch.testing.assert_close(traced(x_TD, gates_TE), mixture_linear(x_TD, experts, gates_TE))


@pytest.mark.parametrize(("E", "R"), [(1, 3), (3, 3), (3, 1), (7, 2)])
def test_experts_that_are_computed_apart_do_not_see_each_other(E: int, R: int) -> None:
    """One expert more, which no token is sent to, changes no bit; and the sum is the reference's."""
    T, D, O = 23, 36, 20
    leaves = {"x": leaf(T, D), "a": leaf(E + 1, R, D), "b": leaf(E + 1, O, R), "base": leaf(T, O)}
    gates_TE = sparse_gates_TE(T, E, 1).requires_grad_()
    leaves["gates"] = gates_TE
    few = {**leaves, "a": leaves["a"][:E], "b": leaves["b"][:E]}
    more_TE = torch.cat([gates_TE, torch.zeros(T, 1)], 1)
    for context in (torch.enable_grad(), torch.no_grad()):
        with context:
            one = mixture_linear(leaves["x"], factors(few), gates_TE, leaves["base"], separate=True)
            two = mixture_linear(leaves["x"], factors(leaves), more_TE, leaves["base"], separate=True)
        assert one.equal(two)
    fast = gradients(lambda: mixture_linear(leaves["x"], factors(few), gates_TE, leaves["base"], separate=True), leaves)
    naive = gradients(
        lambda: leaves["base"] + reference.mixture_linear(leaves["x"], few["a"], few["b"], gates_TE, SCALING),
        leaves,
    )
    for name, expected in naive.items():
        assert_close(name, fast[name], expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    nobody = mixture_linear(leaves["x"], factors(few), torch.zeros(T, E), separate=True)
    assert nobody.equal(torch.zeros(T, O))


@pytest.mark.parametrize(("E", "shared_a"), [(1, False), (3, False), (3, True)])
def test_the_mask_of_dropout_is_drawn_again(E: int, shared_a: bool) -> None:
    """Finite differences with the same draw, in fp64: a backward that forgets or redraws the mask fails."""
    leaves = [torch.randn(5, 6), torch.randn(1 if shared_a else E, 2, 6), torch.randn(E, 4, 2), torch.randn(5, 4)]
    leaves += [torch.rand(5, E)] if E > 1 else []

    def function(x: Tensor, a: Tensor, b: Tensor, base: Tensor, gates: Tensor | None = None) -> Tensor:
        torch.manual_seed(3)
        return recomputed_linear(x, Factors(a, b, SCALING), gates, base, 0.4)

    assert torch.autograd.gradcheck(function, tuple(leaf.double().requires_grad_() for leaf in leaves), atol=1e-6)


@OPERATIONS
def test_dropout_keeps_the_expectation(operation: Any) -> None:
    x_TD, experts = torch.randn(1, 12), Factors(torch.randn(3, 2, 12), torch.randn(3, 5, 2), SCALING)
    gates_TE = torch.rand(1, 3)
    draws = operation(x_TD.expand(4000, -1), experts, gates_TE.expand(4000, -1), p=0.4)
    error = (draws.mean(0) - operation(x_TD, experts, gates_TE)).abs()
    assert draws.std(0).min() > 0
    assert (error < 4.5 * draws.std(0) / 4000**0.5).all()


@pytest.mark.parametrize("triton", [False, True], ids=["recomputed", "triton"])
@pytest.mark.parametrize("p", [0.0, 0.4])
def test_accelerators_keep_the_tokens_and_the_inner_activations_alone(
    p: float, triton: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On meta tensors, which take their path: nothing is read back, and no mask or masked product is kept."""
    monkeypatch.setattr(triton_linear, "DEVICES", {"meta"} if triton else set())
    with torch.device("meta"):
        x, a, b, base = torch.empty(63, 32), torch.empty(3, 2, 32), torch.empty(3, 40, 2), torch.empty(63, 40)
        gates = torch.empty(63, 3)
    leaves = [leaf.requires_grad_() for leaf in (x, a, b, base, gates)]
    saved: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = mixture_linear(x, Factors(a, b, SCALING), gates, base, p=p)
    kept = [list(tensor.shape) for tensor in saved if all(tensor is not leaf for leaf in leaves)]
    assert kept == ([[1], [63, 6]] if triton and p else [[63, 6]])  # a seed is a tensor there
    y.sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape


def test_triton_leaves_what_it_does_not_cover_to_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def covered(E: int, R: int, *, num_a: int = 0, dtype: torch.dtype = torch.float32) -> bool:
        with torch.device("meta"):
            x, a, b = torch.empty(5, 12, dtype=dtype), torch.empty(num_a or E, R, 12), torch.empty(E, 20, R)
        return triton_linear.covers(x, Factors(a, b, SCALING))

    assert not covered(8, 32)
    monkeypatch.setattr(triton_linear, "DEVICES", {"meta"})
    assert covered(8, 32)
    assert not covered(8, 33)
    assert not covered(8, 4, num_a=1)
    assert not covered(8, 4, dtype=torch.float64)


def test_triton_is_part_of_a_compiled_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """On meta tensors its operators have shapes and no values, so that no Triton is needed."""
    monkeypatch.setattr(triton_linear, "DEVICES", {"meta"})
    with torch.device("meta"):
        leaves = {"x": torch.empty(63, 32), "a": torch.empty(3, 2, 32), "b": torch.empty(3, 40, 2)}
        leaves["gates"] = torch.empty(63, 3)
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items()}
    graphs: list[Any] = []

    def keep(graph: Any, _: Any) -> Any:
        graphs.append(graph)
        return graph

    compiled = torch.compile(
        lambda: mixture_linear(leaves["x"], factors(leaves), leaves["gates"], p=0.1), fullgraph=True, backend=keep
    )
    compiled().sum().backward()
    called = [node.target for graph in graphs for node in graph.graph.nodes if node.op == "call_function"]
    assert called.count(torch.ops.moelora.mixture_linear) + called.count(torch.ops.moelora.mixture_linear.default) == 1
    for leaf in leaves.values():
        assert leaf.grad is not None
        assert leaf.grad.shape == leaf.shape
