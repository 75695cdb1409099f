"""The mixture of feed-forward experts equals its reference, forward and every gradient.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, K chosen experts.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moelora.ops import compiled_kernels, segments
from moelora.ops.expert_segments import SegmentPlan
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.mixture_feed_forward import Form, choose_form, mixture_feed_forward
from moelora.ops.segment_kernels import EagerKernels
from moelora.routing.decision import Routing
from tests.ops.compare import assert_close, assert_near, gradients
from tests.ops.feed_forward_case import ROLES, SOME_ROLES, Case


@pytest.fixture(autouse=True)
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loops of the compiled form run as they are; see `test_compiled_kernels` for the compiler."""
    monkeypatch.setattr(compiled_kernels._Compiled, "failure", "not in this test")


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
@pytest.mark.parametrize("K", [1, 2, 3, None])
def test_experts_that_share_their_a(kind: str, K: int | None) -> None:
    """HydraLoRA's form: one A of each linear gets the gradients of all experts."""
    Case(kind, T=63, E=3, K=K, shared_a=True).check()


@pytest.mark.parametrize("kind", ROLES)
def test_segments_longer_than_a_tile(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(segments, "ALIGNMENT", 4)
    for kernels in (EagerKernels, compiled_kernels.CompiledKernels):
        monkeypatch.setattr(kernels, "max_rows", 8)
    Case(kind, T=63, E=3, K=2).check()


@pytest.mark.parametrize(("kind", "roles"), SOME_ROLES)
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
@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
@pytest.mark.parametrize("K", [1, 2, 5, None])
@pytest.mark.parametrize(
    "dtypes",
    [(torch.bfloat16, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)],
    ids=["bf16-fp32", "bf16-bf16", "fp16-fp32"],
)
def test_with_b_of_zero_it_is_the_frozen_block_bit_for_bit(
    kind: str, bias: bool, K: int | None, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    dtype, expert_dtype = dtypes
    precision: dict[str, Any] = {"dtype": dtype, "expert_dtype": expert_dtype}
    case = Case(kind, T=63, D=36, F=52, E=8, K=K, **precision, renormalize=True, bias=bias)
    for factors in case.factors.values():
        factors.b_EOR.data.zero_()
    for form in case.forms():
        # the compiled loops round `act(gate) * up` once, the block twice
        if form != "compiled":
            assert torch.equal(case.fast(form), case.frozen()), form


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [1, 2, 5, None])
def test_with_b_of_zero_it_is_the_frozen_block(kind: str, K: int | None) -> None:
    case = Case(kind, T=63, D=36, F=52, E=8, K=K, renormalize=True, bias=True)
    for factors in case.factors.values():
        factors.b_EOR.data.zero_()
    for form in case.forms():
        assert_close(form, case.fast(form), case.frozen(), rtol=0, atol=1e-6)


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
@pytest.mark.parametrize("K", [2, 3, None])
@pytest.mark.parametrize("shared_a", [False, True], ids=["", "shared"])
def test_no_tokens(kind: str, K: int | None, shared_a: bool) -> None:
    """A batch without tokens (an empty shard) gives an empty output, and each factor a gradient of zero, not None."""
    case = Case(kind, T=0, K=K, shared_a=shared_a)
    for form in (*case.forms(), None):
        found = gradients(partial(case.fast, form), case.leaves)
        assert found["output"].shape == (0, 12)
        for name, leaf in case.leaves.items():
            assert torch.equal(found[name], torch.zeros_like(leaf)), f"{form}: {name}"


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize("K", [2, None])
def test_half_precision(kind: str, K: int | None) -> None:
    case = Case(kind, T=63, E=8, K=K, dtype=torch.bfloat16)
    naive = gradients(case.naive, case.leaves)
    for form in case.forms():
        fast = gradients(partial(case.fast, form), case.leaves)
        assert fast["output"].dtype == torch.bfloat16
        assert fast["weights"].dtype == torch.float32
        for name, expected in naive.items():
            assert_near(f"{form}: {name}", fast[name], expected, 3e-2)


@pytest.mark.parametrize("kind", ROLES)
def test_autocast(kind: str) -> None:
    case = Case(kind, T=63, E=8)

    naive = gradients(case.naive, case.leaves)

    def fast(form: Form) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return case.fast(form)

    for form in case.forms():
        found = gradients(partial(fast, form), case.leaves)
        for name, expected in naive.items():
            assert_near(f"{form}: {name}", found[name], expected, 3e-2)


@pytest.mark.parametrize("kind", ROLES)
def test_experts_in_fp32_on_a_frozen_block_in_bf16(kind: str) -> None:
    """PEFT's default: `autocast_adapter_dtype` keeps the adapter in fp32."""
    for K in (2, 3):
        case = Case(kind, T=63, E=8, K=K, dtype=torch.bfloat16, expert_dtype=torch.float32)
        naive = gradients(case.naive, case.leaves)
        for form in case.forms():
            fast = gradients(partial(case.fast, form), case.leaves)
            for name, expected in naive.items():
                assert_near(f"{form}: {name}", fast[name], expected, 3e-2)


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
@pytest.mark.parametrize("form", ["segments", "grouped"])
def test_dropout_keeps_the_expectation(roles: tuple[str, ...], form: Form) -> None:
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
    draws = case.fast(form).detach().view(2, repeats, -1)
    deviation = draws.std(1)
    assert deviation.min() > 0
    assert ((draws.mean(1) - exact).abs() < 4.5 * deviation / repeats**0.5).all()


@pytest.mark.parametrize("kind", ROLES)
@pytest.mark.parametrize(
    ("form", "K"),
    [
        ("gathered", 2),
        ("segments", 2),
        ("segments", 3),
        ("masked", 2),
        ("compiled", 2),
        ("grouped", 2),
        ("grouped", None),
    ],
)
def test_gradients_under_dropout_are_those_of_what_was_computed(kind: str, form: Form, K: int) -> None:
    """Finite differences with the same draw: a backward that forgets or redraws the mask fails."""
    activation = nn.SiLU() if form == "compiled" else nn.Tanh()
    case = Case(kind, T=3, D=4, F=5, R=2, K=K, dtype=torch.float64, activation=activation)
    case.leaves["weights"] = case.leaves["weights"].detach().double().requires_grad_()
    case.scores_TE, case.kept_TK = case.scores_TE.double(), case.kept_TK.double()
    case.dropout = nn.Dropout(0.4)

    def function(*tensors: Tensor) -> Tensor:
        torch.manual_seed(3)
        return case.fast(form)

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


@pytest.mark.parametrize("K", [2, 3])
@pytest.mark.parametrize("form", ["gathered", "segments", "compiled", "masked", "grouped"])
def test_training_after_inference_mode(form: Form, K: int) -> None:
    """Nothing of one call reaches the next, so what an inference-mode call made cannot be met again in training."""
    case = Case("gated", T=63, E=8, K=K)
    before = gradients(partial(case.fast, form), case.leaves)
    with torch.inference_mode():
        assert torch.equal(case.fast(form), before["output"])
    for name, found in gradients(partial(case.fast, form), case.leaves).items():
        assert torch.equal(found, before[name]), name


@pytest.mark.parametrize("form", ["segments", "compiled"])
@pytest.mark.parametrize("K", [2, 3])
def test_what_the_backward_pass_needs_is_in_the_saved_tensors(form: Form, K: int) -> None:
    """Checkpointing frees saved tensors and no others: the dropout mask and the sorted choices must be among them."""
    case = Case("gated", T=63, E=8, K=K)
    masks: list[Tensor] = []

    def dropout(x: Tensor) -> Tensor:
        masks.append(nn.functional.dropout(x, 0.4))
        return masks[-1]

    case.dropout = dropout
    saved: list[int] = []

    def pack(x: Tensor) -> Tensor:
        saved.append(x.data_ptr())
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        y_TD = case.fast(form)
    assert masks[1].shape == (63, 20)
    assert masks[1].data_ptr() in saved
    nodes: list[Any] = [y_TD.grad_fn]
    kept: list[Any] = []
    while nodes:
        node = nodes.pop()
        kept += getattr(node, "__dict__", {}).values()
        nodes += [parent for parent, _ in node.next_functions if parent is not None]
    assert any(isinstance(value, SegmentPlan) for value in kept)
    for value in kept:
        assert not any(isinstance(part, Tensor) for part in (value, *vars(value).values()))


class Traced(nn.Module):
    """A mixture whose routing depends on its input, as in a model."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case, self.router = case, nn.Linear(12, 3, bias=False)

    def forward(self, x_TD: Tensor) -> Tensor:
        probs_TE = self.router(x_TD).softmax(-1)
        weights_TK, ids_TK = probs_TE.topk(2)
        routing = Routing(probs_TE, probs_TE, weights_TK, ids_TK)
        return mixture_feed_forward(x_TD, routing, self.case.block(), self.case.experts())


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.* is (deprecated|not supported):DeprecationWarning")
@pytest.mark.parametrize("kind", ROLES)
def test_tracing_does_not_freeze_the_routing_of_one_batch(kind: str) -> None:
    module = Traced(Case(kind)).requires_grad_(False)
    for leaf in module.case.leaves.values():
        leaf.requires_grad_(False)
    traced = torch.jit.trace(module, torch.randn(5, 12), check_trace=False)
    for tokens in (5, 1, 63):
        x_TD = torch.randn(tokens, 12)
        torch.testing.assert_close(traced(x_TD), module(x_TD), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("form", ["gathered", "segments", "compiled", "masked", "grouped"])
def test_new_tensors_are_made_on_the_device_of_the_inputs(form: Form) -> None:
    """With another default device, a tensor made without saying where would meet the inputs as a stranger."""
    case = Case("gated", T=63, E=3, bias=True)
    case.dropout = nn.Dropout(0.4)
    with torch.device("meta"):
        case.fast(form).sum().backward()
    for name, leaf in case.leaves.items():
        assert leaf.grad is not None, name
        assert leaf.grad.device.type == "cpu", name


@pytest.mark.parametrize(
    ("K", "T", "device", "form"),
    [
        (None, 63, "cpu", "masked"),
        (2, 1, "cpu", "gathered"),
        (2, 63, "cpu", "segments"),
        (2, 1, "meta", "gathered"),
        (2, 63, "meta", "grouped"),
        (None, 63, "meta", "grouped"),
        (None, 0, "meta", "masked"),
    ],
)
def test_forms_are_chosen_by_shape(K: int | None, T: int, device: str, form: Form) -> None:
    """A meta tensor is on no CPU, and has no kernels of Triton."""
    case = Case("gated", T=T, E=3, K=K)
    x_TD = case.leaves["x"].to(device)
    assert choose_form(x_TD, case.routing(), case.block(), case.experts()) == form
    own = replace(case.block(), hidden_dropout=nn.Dropout(0.1))
    assert choose_form(x_TD, case.routing(), own, case.experts()) == "masked"
