"""Triton's kernels on a feed-forward block equal the reference, forward and every gradient.

On a GPU, or on the CPU by Triton's interpreter; `make test-triton` runs these. Shape suffixes: T tokens, D model
features, F inner features, E experts, R rank of one expert, K chosen experts.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moelora.ops import triton_check, triton_feed_forward, triton_linear
from moelora.ops.mixture_feed_forward import Form, choose_form, mixture_feed_forward
from tests.ops.compare import assert_near, gradients
from tests.ops.feed_forward_case import ROLES, SOME_ROLES, Case

triton = pytest.importorskip("triton", reason="no Triton; make test-triton installs it")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu" and not triton.knobs.runtime.interpret:
    pytest.skip("needs a GPU, or TRITON_INTERPRET=1 as make test-triton sets it", allow_module_level=True)

HALF = torch.bfloat16 if DEVICE == "cuda" else torch.float16
"""The interpreter multiplies no matrices of bf16."""


@pytest.fixture(autouse=True)
def _is_chosen(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(triton_linear, "DEVICES", {DEVICE})
    with torch.device(DEVICE):
        yield


class TritonCase(Case):
    """A case that the kernels compute."""

    def forms(self) -> tuple[Form, ...]:
        assert self.chosen() == "triton"
        return ("triton",)


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    ("T", "F", "E", "R", "K"),
    [
        pytest.param(*sizes, id="T{}-F{}-E{}-R{}-K{}".format(*sizes))
        for sizes in [
            (17, 3, 1, 1, 1),
            (33, 20, 3, 3, 3),
            (71, 70, 5, 3, 2),  # several tiles of tokens, and parts of the sums
            (7, 130, 8, 2, 5),  # several blocks of inner features
            (9, 36, 16, 4, 2),  # as many ranks as are covered in fp32
            (9, 20, 3, 3, None),  # all experts
        ]
    ],
)
def test_it_equals_the_reference(kind: str, T: int, F: int, E: int, R: int, K: int | None) -> None:
    TritonCase(kind, T=T, F=F, E=E, R=R, K=K).check()


@pytest.mark.parametrize(("kind", "roles"), SOME_ROLES)
def test_experts_on_some_linears_only(kind: str, roles: tuple[str, ...]) -> None:
    TritonCase(kind, T=9, roles=roles).check()


@pytest.mark.parametrize("kind", ROLES)
def test_experts_that_share_their_a(kind: str) -> None:
    TritonCase(kind, T=9, shared_a=True).check()


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    "activation", [nn.GELU(approximate="tanh"), nn.GELU(), nn.ReLU()], ids=["gelu_tanh", "gelu", "relu"]
)
def test_other_activations(kind: str, activation: nn.Module) -> None:
    TritonCase(kind, T=9, activation=activation).check()


@pytest.mark.parametrize("kind", ROLES)
def test_dropped_choices(kind: str) -> None:
    case = TritonCase(kind, T=9)
    case.kept_TK[[0, 3, 3, 5], [1, 0, 1, 0]] = 0
    case.check()


def test_what_is_not_covered_is_computed_without_them() -> None:
    assert Case("gated", T=9).chosen() == "triton"
    fp64: dict[str, Any] = {"dtype": torch.float64}
    for words in (
        {"E": 13, "R": 5},
        {"E": 17, "R": 16, "dtype": HALF},
        {"activation": nn.Tanh()},
        {"roles": ()},
        fp64,
        {**fp64, "expert_dtype": torch.float32},
    ):
        assert Case("gated", T=9, **words).chosen() != "triton", words
    two_ranks = Case("gated", T=9)
    two_ranks.factors["up"] = Case("gated", R=2).factors["up"]
    assert two_ranks.chosen() != "triton"
    assert Case("gated", T=1).chosen() == "gathered"
    case = Case("gated", T=9)
    own = replace(case.block(), hidden_dropout=nn.Dropout(0.1))
    assert choose_form(case.leaves["x"], case.routing(), own, case.experts()) == "masked"


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("autocast", [False, True], ids=["half", "autocast"])
def test_half_precision(kind: str, autocast: bool) -> None:
    case = TritonCase(kind, T=35, F=52, E=8, R=8 if autocast else 32, dtype=torch.float32 if autocast else HALF)

    def run() -> Tensor:
        with torch.autocast(DEVICE, dtype=HALF, enabled=autocast):
            return case.fast("triton")

    found = gradients(run, case.leaves)
    assert found["output"].dtype == HALF
    for name, expected in gradients(case.naive, case.leaves).items():
        assert_near(name, found[name], expected, 2e-2)


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [1, 2, 5])
def test_with_b_of_zero_it_is_the_frozen_block_up_to_one_rounding(kind: str, K: int) -> None:
    """Of the activation, whose exponential is not the frozen block's to the last bit of fp32."""
    case = TritonCase(kind, T=63, D=36, F=52, E=8, K=K, dtype=HALF, expert_dtype=torch.float32, renormalize=True)
    for factors in case.factors.values():
        factors.b_EOR.data.zero_()
    found, frozen = case.fast("triton"), case.frozen()
    assert found.dtype == frozen.dtype
    assert (found != frozen).float().mean() < 0.01
    torch.testing.assert_close(found, frozen, rtol=4 * torch.finfo(HALF).eps, atol=4 * torch.finfo(HALF).eps)


@pytest.mark.parametrize("kind", ROLES)
def test_frozen_factors_get_no_gradient(kind: str) -> None:
    case = TritonCase(kind, T=9)
    expected = gradients(case.naive, case.leaves)
    for name, leaf in case.leaves.items():
        leaf.requires_grad_(name in ("x", "weights")).grad = None
    trained = {name: case.leaves[name] for name in ("x", "weights")}
    for name, found in gradients(partial(case.fast, "triton"), trained).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5 * float(expected[name].abs().max()))
    assert all(leaf.grad is None for name, leaf in case.leaves.items() if name not in trained)


def test_dropout_draws_one_mask_for_each_choice_and_both_passes() -> None:
    """With A and B of one on down, the output less the frozen block's is what each choice kept of its hidden units."""
    T, F, p = 37, 70, 0.3
    case = TritonCase("plain", T=T, D=F, F=F, E=2, R=F, K=2, roles=("down",), bias=False)
    case.leaves["x"] = torch.randn(T, F).abs().requires_grad_()
    case.linears["up"].weight.data.copy_(torch.eye(F))
    case.linears["down"].weight.data.zero_()
    for leaf in (case.leaves["down_a"], case.leaves["down_b"]):
        leaf.data.copy_(torch.eye(F).expand_as(leaf))
    case.dropout = nn.Dropout(p)
    case.leaves["weights"] = torch.ones(T, 2, requires_grad=True)

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return case.fast("triton")

    found = gradients(seeded, case.leaves)
    act_TF = case.activation(case.leaves["x"])
    kept_TF = found["output"] * (1 - p) / case.factors["down"].scaling / act_TF
    counts = [int((kept_TF.round() == n).sum()) for n in range(3)]
    torch.testing.assert_close(kept_TF, kept_TF.round(), rtol=1e-4, atol=1e-4)
    assert sum(counts) == T * F
    for n, share in enumerate((p * p, 2 * p * (1 - p), (1 - p) ** 2)):  # two choices, each with a mask of its own
        assert abs(counts[n] / (T * F) - share) < 4 * (share * (1 - share) / (T * F)) ** 0.5
    assert torch.equal(seeded(), found["output"])
    assert not torch.equal(case.fast("triton"), found["output"])
    # the same kept units give the gradient of x
    upstream = torch.randn(T, F, generator=torch.Generator("cpu").manual_seed(5), device="cpu").to(DEVICE)
    with torch.enable_grad():
        x = case.leaves["x"].detach().requires_grad_()
        mine = case.activation(x) * kept_TF.detach().round() * case.factors["down"].scaling / (1 - p)
        (right,) = torch.autograd.grad(mine, x, upstream)
    torch.testing.assert_close(found["x"], right, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ROLES)
def test_dropout_gradients_of_the_factors(kind: str) -> None:
    """The output is linear in down's A and in up's B, so its change along each is the gradient, with the same draw."""
    case = TritonCase(kind, T=9, activation=nn.ReLU())
    case.dropout = nn.Dropout(0.4)

    def seeded() -> Tensor:
        torch.manual_seed(3)
        return case.fast("triton")

    grads = gradients(seeded, case.leaves)
    output = grads["output"]
    upstream = torch.randn(output.shape, generator=torch.Generator("cpu").manual_seed(5), device="cpu").to(DEVICE)
    for name in ("down_a", "down_b", "weights"):
        leaf = case.leaves[name]
        step = torch.randn_like(leaf)
        before = leaf.detach().clone()
        leaf.data.add_(step)
        change = ((seeded().detach() - output).double() * upstream.double()).sum()
        leaf.data.copy_(before)
        expected = (grads[name].double() * step.double()).sum()
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-3)


def test_nothing_wide_is_kept_but_the_frozen_products() -> None:
    case = TritonCase("gated", T=63, F=52, E=8)
    case.dropout = nn.Dropout(0.4)
    _, num_wide = case.kept_wide("triton")
    assert num_wide == 2


def test_compiled_it_is_in_the_graph_and_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = TritonCase("gated", T=37)
    expected = gradients(case.fast, case.leaves)
    monkeypatch.setattr(triton_check, "_WORKS", {})  # the check of the kernels is no part of the graph
    compiled = torch.compile(case.fast, fullgraph=True, backend="aot_eager")
    for name, found in gradients(compiled, case.leaves).items():
        torch.testing.assert_close(found, expected[name], rtol=1e-5, atol=1e-5)
    assert dict(triton_check._WORKS) == {("feed_forward", DEVICE, torch.float32): True}


def test_compiled_it_takes_any_number_of_tokens_in_one_graph() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    case = TritonCase("gated", T=20)
    experts, block = case.experts(), case.block()
    compiled = torch.compile(mixture_feed_forward, dynamic=True, fullgraph=True, backend="aot_eager")
    for tokens in (37, 71, 100):
        other = TritonCase("gated", T=tokens)
        found = compiled(other.leaves["x"], other.routing(), block, experts)
        torch.testing.assert_close(
            found, mixture_feed_forward(other.leaves["x"], other.routing(), block, experts), rtol=1e-5, atol=1e-5
        )
        found.sum().backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("state", ["inference mode", "no grad", "autocast", "checkpointing"])
def test_the_check_does_not_depend_on_where_the_first_call_is(monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    monkeypatch.setattr(triton_check, "_WORKS", {})
    case = TritonCase("gated", T=9, dtype=HALF if state == "autocast" else torch.float32)
    if state == "checkpointing":
        expected = gradients(case.naive, case.leaves)
        found = gradients(lambda: checkpoint(case.fast, use_reentrant=False), case.leaves)
        for name, value in expected.items():
            assert_near(name, found[name], value, 1e-5)
    else:
        states = {"inference mode": torch.inference_mode(), "no grad": torch.no_grad()}
        with states.get(state, torch.autocast(DEVICE, dtype=HALF)):
            case.fast()
    assert list(triton_check._WORKS.values()) == [True]


def test_relu_lets_nan_pass() -> None:
    case = TritonCase("plain", T=9, activation=nn.ReLU())
    case.leaves["x"].data[3] = float("nan")
    found = case.fast("triton")
    assert found[3].isnan().all()
    assert not found[:3].isnan().any()


def test_kernels_that_give_something_else_are_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = triton_feed_forward._blocks
    monkeypatch.setattr(triton_feed_forward, "_blocks", lambda M: {**right(M), "BM": 8})  # other ranks are lost
    monkeypatch.setattr(triton_check, "_WORKS", {})
    with pytest.warns(RuntimeWarning, match="Triton's feed_forward kernels do not work on .* continuing without them"):
        assert Case("gated", T=9).chosen() != "triton"
    assert Case("gated", T=9).chosen() != "triton"


# As in `test_triton_linear`. "plain" has one linear before the activation, and no experts on it.
COMPILE = """
import sys
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from moelora.ops import triton_feed_forward_kernels as kernels
from moelora.ops.triton_feed_forward import _blocks

types = {"seed": "*i64", "ids": "*i64", "weights": "*fp32", "sums": "*fp32", "p": "fp32"}
types |= {each: "fp32" for each in ("up_scale", "gate_scale", "down_scale")}
numbers = {"T", "F", "E", "R", "K", "features", "tokens"}
numbers |= {"row_stride", "expert_stride", "grad_row_stride", "part_stride"}
absent = ("gate", "gate_b", "gate_inner", "grad_gate", "gate_sums", "up_b", "up_inner", "up_sums", "seed")
plain = {"ACTIVATION": "gelu", **dict.fromkeys(absent)}
cases = ((80, "fp32", 64, {}), (90, "bf16", 256, {}), (90, "bf16", 64, {}), (90, "bf16", 8, plain))
for arch, dtype, M, given in cases:
    blocks = _blocks(M)
    options = {each: blocks.pop(each) for each in ("num_warps", "num_stages")}
    for name in ("forward", "token_grads", "factor_grads"):
        kernel = getattr(kernels, name)
        constants = {**blocks, "BK": 2, "ACTIVATION": "silu", **given}
        constants = {each: value for each, value in constants.items() if each in kernel.arg_names}
        signature = {
            each: "constexpr" if each in constants else "i32" if each in numbers else types.get(each, f"*{dtype}")
            for each in kernel.arg_names
        }
        aligned = {(i,): [["tt.divisibility", 16]] for i, each in enumerate(signature) if signature[each][0] == "*"}
        source = ASTSource(kernel, signature, constants, aligned)
        found = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        assert found.asm["cubin"]
        assert found.metadata.shared < 99 * 1024, (name, arch, M, found.metadata.shared)
        print(name, arch, M, found.metadata.shared)
"""


def test_the_kernels_compile_for_gpus(tmp_path: Path) -> None:
    """The interpreter takes more than the compiler does; the largest size has to fit a consumer's shared memory."""
    environment = {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 12
