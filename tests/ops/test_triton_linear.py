"""Triton's kernels equal the reference, forward and every gradient: on a GPU, or on the CPU by Triton's interpreter.

`make test-triton` runs these. Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one
expert, K chosen experts.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moelora.ops import mixture_linear as chosen
from moelora.ops import reference, triton_check, triton_linear
from moelora.ops.factors import Factors
from tests.ops.compare import assert_close, assert_near, gradients

triton = pytest.importorskip("triton", reason="no Triton; make test-triton installs it")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as make test-triton sets it", allow_module_level=True)

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""The interpreter multiplies no matrices of bf16."""

SCALING = 1.7


@pytest.fixture(autouse=True)
def _is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_linear, "DEVICES", {DEVICE})


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape).to(DEVICE, dtype).requires_grad_()


def leaves_of(T: int, D: int, O: int, E: int, R: int, K: int, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    gates_TE = torch.zeros(T, E).scatter(1, torch.rand(T, E).topk(K).indices, torch.rand(T, K) + 0.1)
    leaves = {"x": leaf(T, D, dtype=dtype), "a": leaf(E, R, D, dtype=dtype), "b": leaf(E, O, R, dtype=dtype)}
    return {**leaves, "base": leaf(T, O, dtype=dtype), "gates": gates_TE.to(DEVICE).requires_grad_()}


def fast(leaves: dict[str, Tensor], **options: Any) -> Tensor:
    experts = Factors(leaves["a"], leaves["b"], SCALING)
    assert triton_linear.covers(leaves["x"], experts)
    return chosen.mixture_linear(leaves["x"], experts, leaves.get("gates"), leaves.get("base"), **options)


def naive(leaves: dict[str, Tensor]) -> Tensor:
    x_TD = leaves["x"].flatten(0, -2)
    delta = reference.mixture_linear(x_TD, leaves["a"], leaves["b"], leaves.get("gates"), SCALING)
    delta = delta.view(*leaves["x"].shape[:-1], -1)
    return leaves["base"] + delta if "base" in leaves else delta


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    for name, value in expected.items():
        assert_close(name, found[name], value, rtol=1e-5, atol=1e-5 * float(value.abs().max()))


@pytest.mark.parametrize(
    ("T", "D", "O", "E", "R", "K"),
    [
        pytest.param(*sizes, id="T{}-D{}-O{}-E{}-R{}-K{}".format(*sizes))
        for sizes in [
            (1, 5, 7, 8, 3, 2),
            (7, 12, 20, 1, 1, 1),
            (33, 12, 20, 33, 1, 8),
            (71, 70, 36, 5, 3, 2),  # several tiles of tokens, blocks of features and parts of the sums
            (5, 36, 34, 16, 16, 2),  # as many ranks as are covered
        ]
    ],
)
def test_it_equals_the_reference(T: int, D: int, O: int, E: int, R: int, K: int) -> None:
    leaves = leaves_of(T, D, O, E, R, K)
    assert_equal(gradients(lambda: fast(leaves), leaves), gradients(lambda: naive(leaves), leaves))


def test_one_lora_without_gates_or_base_in_a_batch() -> None:
    leaves = {"x": leaf(3, 7, 12), "a": leaf(1, 3, 12), "b": leaf(1, 20, 3)}
    assert_equal(gradients(lambda: fast(leaves), leaves), gradients(lambda: naive(leaves), leaves))


def test_what_is_frozen_gets_no_gradient() -> None:
    leaves = leaves_of(7, 12, 20, 3, 2, 2)
    expected = gradients(lambda: naive(leaves), leaves)
    for trained in ("a", "gates", "x"):
        some = {name: found.detach().requires_grad_(name == trained) for name, found in leaves.items()}
        found = gradients(lambda some=some: fast(some), {trained: some[trained]})  # type: ignore[misc]
        assert_equal(found, {name: expected[name] for name in found})
        assert [name for name, one in some.items() if one.grad is not None] == [trained]


@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_half_precision(autocast: bool) -> None:
    leaves = leaves_of(35, 12, 20, 8, 3, 2, torch.float32 if autocast else HALF)

    def run() -> Tensor:
        with torch.autocast(DEVICE, dtype=HALF, enabled=autocast):
            return fast(leaves)

    found = gradients(run, leaves)
    assert found["output"].dtype == leaves["base"].dtype
    assert found["gates"].dtype == torch.float32
    for name, expected in gradients(lambda: naive(leaves), leaves).items():
        assert_near(name, found[name], expected, 2e-2)


def test_an_expert_without_tokens_has_a_zero_gradient_and_no_tokens_give_zeros() -> None:
    leaves = leaves_of(7, 12, 20, 3, 2, 3)
    leaves["gates"] = torch.tensor([[0.4, 0.0, 0.6]]).repeat(7, 1).to(DEVICE).requires_grad_()
    found = gradients(lambda: fast(leaves), leaves)
    for name in ("a", "b"):
        assert found[name][1].abs().max() == 0
        assert found[name][0].abs().max() > 0
    nobody = leaves_of(0, 12, 20, 3, 2, 2)
    found = gradients(lambda: fast(nobody), nobody)
    assert found["output"].shape == (0, 20)
    assert all(found[name].equal(torch.zeros_like(one)) for name, one in nobody.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_with_b_of_zero_it_is_the_frozen_linear_bit_for_bit(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":  # where the check fails in bf16, but products with zeros are right
        monkeypatch.setitem(triton_check._WORKS, ("linear", DEVICE, torch.bfloat16), True)
    leaves = leaves_of(35, 12, 20, 8, 4, 2, dtype)
    assert torch.equal(fast({**leaves, "b": torch.zeros_like(leaves["b"])}), leaves["base"])


def test_dropout_draws_one_mask_for_both_passes() -> None:
    """With A and B of one the output is the mask; with it the reference gives every gradient."""
    T, D, p = 37, 70, 0.3

    def seeded(leaves: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(3)
        return fast(leaves, p=p)

    one = torch.eye(D, device=DEVICE)[None]
    ones = {"x": torch.ones(T, D, device=DEVICE).requires_grad_(), "a": one, "b": one}
    mask_TD = seeded(ones).detach() / SCALING
    torch.testing.assert_close(mask_TD[mask_TD != 0], torch.full_like(mask_TD, 1 / (1 - p))[mask_TD != 0])
    assert abs(float((mask_TD == 0).float().mean()) - p) < 4 * (p * (1 - p) / (T * D)) ** 0.5
    assert not seeded(ones).equal(fast(ones, p=p))
    leaves = leaves_of(T, D, 20, 3, 2, 2)
    found = gradients(lambda: seeded(leaves), leaves)
    assert_equal(found, gradients(lambda: naive({**leaves, "x": leaves["x"] * mask_TD}), leaves))


def test_compiled_it_is_in_the_graph_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = leaves_of(37, 12, 20, 3, 2, 2)
    expected = gradients(lambda: fast(leaves), leaves)
    monkeypatch.setattr(triton_check, "_WORKS", {})  # the check of the kernels is no part of the graph
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    assert_equal(gradients(lambda: compiled(leaves), leaves), expected)
    assert dict(triton_check._WORKS) == {("linear", DEVICE, torch.float32): True}


def test_kernels_that_give_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    leaves = leaves_of(5, 12, 20, 3, 2, 2)
    experts = Factors(leaves["a"], leaves["b"], SCALING)
    right = triton_linear._blocks
    monkeypatch.setattr(triton_linear, "_blocks", lambda M: {**right(M), "BM": 8})  # ranks that do not fit are lost
    monkeypatch.setattr(triton_check, "_WORKS", {})
    with pytest.warns(RuntimeWarning, match="Triton's linear kernels do not work on .* continuing without them"):
        assert not triton_linear.covers(leaves["x"], experts)
    assert not triton_linear.covers(leaves["x"], experts)


# The kernels are read from their file: to import moelora takes longer than to compile one.
COMPILE = """
import importlib.util, sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

spec = importlib.util.spec_from_file_location("kernels", sys.argv[1])
kernels = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kernels)
types = {"seed": "*i64", "gates": "*fp32", "grad_gates": "*fp32", "scale": "fp32", "p": "fp32"}
numbers = {"T", "D", "O", "E", "R", "tokens"}
routed, lora = {}, {"E": 1, "gates": None, "grad_gates": None, "base": None}
rank_one = {"R": 1, "seed": None, "grad_x": None}
for arch, dtype, given in ((80, "fp32", routed), (90, "bf16", lora), (90, "bf16", rank_one)):
    for name in ("forward", "token_grads", "factor_grads"):
        kernel = getattr(kernels, name)
        constants = {"BT": 16, "BM": 256, "BX": 32, **{each: given[each] for each in given if each in kernel.arg_names}}
        signature = {
            each: "constexpr" if each in constants else "i32" if each in numbers else types.get(each, f"*{dtype}")
            for each in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(signature) if signature[each][0] == "*"}
        source = ASTSource(kernel, signature, constants, aligned)
        target = GPUTarget("cuda", arch, 32)
        found = triton.compile(source, target=target, options={"num_warps": 8, "num_stages": 2})
        assert found.asm["cubin"]
        assert found.metadata.shared < 99 * 1024, found.metadata.shared
        print(name, arch)
"""


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does; the largest size has to fit a consumer's shared memory."""
    from moelora.ops import triton_kernels

    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    arguments = [sys.executable, "-c", COMPILE, str(triton_kernels.__file__)]
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 9
