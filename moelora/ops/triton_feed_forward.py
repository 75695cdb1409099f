"""A mixture of feed-forward experts by Triton's kernels: one launch between the frozen products, and two backward.

See `triton_feed_forward_kernels` for how. With few tokens the inner features are split among more programs, and with
many the tokens in the sums of the factors' gradients; each is a launch more. Beside the outputs of the frozen linears
and the inner activations of up and gate nothing is kept for the backward pass, and no shape depends on the routing. The
operators are torch's own kind, so that `torch.compile` takes them into its graph, and they have shapes without Triton
too.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K choices of a token, M = E * R, S parts of
the inner features or of the tokens.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelora.ops import triton_linear
from moelora.ops.activation_vjp import activation_vjp
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.triton_check import kernels_work
from moelora.ops.triton_linear import PROGRAMS, ceil_div
from moelora.routing.decision import Routing

ACTIVATIONS = ("silu", "relu", "gelu", "gelu_tanh")
"""Those that the kernels know, by `ActivationVjp.name`."""

MOST_RANKS = {torch.bfloat16: 256, torch.float16: 256, torch.float32: 64}
"""E * R up to which each choice meets the factors of all experts, by their dtype; fp32 has no fast products."""


def covers(x_TD: Tensor, block: FrozenFeedForward, experts: FeedForwardExperts) -> bool:
    """Whether the kernels compute this: a known activation, experts of one rank, few ranks in all, known dtypes.

    At the first such call of a process for a dtype they are checked.
    """
    device = x_TD.device.type
    if device not in triton_linear.DEVICES:
        return False
    kinds = {(*_sizes(factors), factors.b_EOR.dtype) for factors in _present(experts)}
    if len(kinds) != 1 or x_TD.dtype not in MOST_RANKS or activation_vjp(block.activation).name not in ACTIVATIONS:
        return False
    ((num_experts, rank, dtype),) = kinds
    most = MOST_RANKS.get(dtype, 0)
    return num_experts * rank <= most and kernels_work("feed_forward", most, device, dtype)


def _present(experts: FeedForwardExperts) -> list[Factors]:
    return [factors for factors in (experts.up, experts.gate, experts.down) if factors is not None]


def _sizes(factors: Factors) -> tuple[int, int]:
    """E and R."""
    return factors.num_experts, factors.b_EOR.shape[2]


def triton_feed_forward(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner_TER: Tensor | None,
    gate_inner_TER: Tensor | None,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    """See `moelora.ops.masked_experts`, whose arguments and results these are; what `covers` says is covered.

    LoRA dropout in front of the experts' A on down is a function of a seed, which the device's generator draws, and of
    each element's place.
    """
    E, R = _sizes(_present(experts)[0])
    T = up_TF.shape[0]
    ids_TK = routing.ids_TK
    if ids_TK is None:
        ids_TK = torch.arange(E, device=up_TF.device).expand(T, E)
    p = 0.0 if experts.down is None else experts.dropout_p
    up, gate, down = experts.up, experts.gate, experts.down

    def inner(inner_TER: Tensor | None) -> Tensor | None:
        return None if inner_TER is None else inner_TER.expand(-1, E, -1).contiguous().view(T, E * R)

    hidden_TF, parts_STM = torch.ops.moelora.mixture_hidden(
        up_TF.contiguous(),
        None if gate_TF is None else gate_TF.contiguous(),
        inner(up_inner_TER),
        inner(gate_inner_TER),
        None if up is None else up.b_EOR.contiguous(),
        None if gate is None else gate.b_EOR.contiguous(),
        None if down is None else down.expanded_a_ERD().contiguous(),
        routing.weights_TK.contiguous(),
        ids_TK.contiguous(),
        torch.randint(2**62, (1,), device=up_TF.device) if p > 0 else None,
        [
            1.0 if up is None else up.scaling,
            1.0 if gate is None else gate.scaling,
            1.0 if down is None else down.scaling / (1 - p),
        ],
        p,
        activation_vjp(block.activation).name,
        block.kind == "fused",
    )
    if down is None:
        return hidden_TF, None
    inner_TM = parts_STM[0] if parts_STM.shape[0] == 1 else parts_STM.sum(0).to(down.a_ERD.dtype)
    return hidden_TF, inner_TM.view(T, E, R)


class _Given(NamedTuple):
    """The operators' arguments that all three have; a fused `up` holds the gate in its first half, as B does."""

    up: Tensor
    gate: Tensor | None
    up_inner: Tensor | None
    gate_inner: Tensor | None
    up_b: Tensor | None
    gate_b: Tensor | None
    down_a: Tensor | None
    weights: Tensor
    ids: Tensor
    seed: Tensor | None
    scales: list[float]
    p: float
    activation: str
    fused: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """T, F, E, R and K."""
        T, F = self.up.shape
        F = F // 2 if self.fused else F
        if self.down_a is not None:
            E, R = self.down_a.shape[:2]
        else:
            b = self.up_b if self.up_b is not None else self.gate_b
            assert b is not None
            E, R = b.shape[0], b.shape[2]
        return T, F, E, R, self.weights.shape[1]

    @property
    def blocks(self) -> dict[str, int]:
        """Sizes of a program, see `_blocks`."""
        _, _, E, R, _ = self.sizes
        return _blocks(E * R)

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Those that the kernels read, gate and up apart."""
        up, gate, up_inner, gate_inner, up_b, gate_b, down_a, weights, ids, seed, *_ = self
        if self.fused:
            gate, up = up.chunk(2, 1)
            if up_b is not None:
                gate_inner, (gate_b, up_b) = up_inner, up_b.chunk(2, 1)
        return up, gate, up_inner, gate_inner, up_b, gate_b, down_a, weights, ids, seed

    def scalars(self) -> tuple[float, ...]:
        """What follows the tensors: sizes, strides, scales."""
        T, F, E, R, K = self.sizes
        up_scale, gate_scale, down_scale = self.scales
        wide = 2 * F if self.fused else F
        return T, F, E, R, K, wide, wide * R, up_scale, up_scale if self.fused else gate_scale, down_scale, self.p


def _blocks(M: int) -> dict[str, int]:
    """Sizes of a program: a tile of the factors of three linears fits the shared memory of a consumer's GPU, 99 KB."""
    size = max(16, 1 << (M - 1).bit_length())
    return {
        "BT": min(32, 4096 // size),
        "BM": size,
        "BX": min(64, 4096 // size),
        "num_warps": 4 if size <= 64 else 8,
        "num_stages": 1,
    }


def _splits(given: _Given) -> int:
    """Parts of the inner features, of which each has programs of its own; by the sizes alone."""
    T, F, *_ = given.sizes
    wanted = ceil_div(PROGRAMS, torch.sym_max(ceil_div(T, given.blocks["BT"]), 1))
    return torch.sym_max(torch.sym_min(wanted, ceil_div(F, given.blocks["BX"])), 1)


_GIVEN = (
    "Tensor up, Tensor? gate, Tensor? up_inner, Tensor? gate_inner, Tensor? up_b, Tensor? gate_b, Tensor? down_a, "
    "Tensor weights, Tensor ids, Tensor? seed, float[] scales, float p, str activation, bool fused"
)


@torch.library.custom_op("moelora::mixture_hidden", mutates_args=(), schema=f"({_GIVEN}) -> (Tensor, Tensor)")
def _forward(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`sum_k w_k a_k` [T, F], and `scale * w_k A_k a_k` for each part of the inner features, [S, T, M]."""
    from moelora.ops.triton_feed_forward_kernels import forward

    given = _Given(*arguments)
    y, inner = _forward_shapes(*arguments)
    (T, F, *_), S, blocks = given.sizes, _splits(given), given.blocks
    features = _features(F, S, blocks)
    with torch.cuda.device_of(y):
        forward[(ceil_div(T, blocks["BT"]), S)](
            *given.tensors(), y, inner, *given.scalars(), features, given.activation, **blocks
        )
    return y, inner


def _features(F: int, S: int, blocks: dict[str, int]) -> int:
    """The inner features of a part, whole blocks of them."""
    return ceil_div(F, S * blocks["BX"]) * blocks["BX"]


@_forward.register_fake
def _forward_shapes(*arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Given(*arguments)
    T, F, E, R, _ = given.sizes
    y, S = given.up.new_empty(T, F), _splits(given)
    if given.down_a is None:
        return y, y.new_empty(0)
    return y, y.new_empty(S, T, E * R, dtype=given.down_a.dtype if S == 1 else torch.float32)


@torch.library.custom_op(
    "moelora::mixture_hidden_token_grads",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_inner, {_GIVEN}) -> (Tensor, Tensor)",
)
def _token_grads(grad: Tensor, grad_inner: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up side by side; of inner activations and weights for each part, [S, T, 2M + K]."""
    from moelora.ops.triton_feed_forward_kernels import token_grads

    given = _Given(*arguments)
    grad_before, sums = _token_grads_shapes(grad, grad_inner, *arguments)
    (T, F, _, _, K), S, blocks = given.sizes, _splits(given), given.blocks
    is_gated = grad_before.shape[1] > F
    grad_gate, grad_up = grad_before.chunk(2, 1) if is_gated else (None, grad_before)
    with torch.cuda.device_of(grad):
        token_grads[(ceil_div(T, blocks["BT"]), S)](
            grad,
            grad_inner,
            *given.tensors(),
            grad_up,
            grad_gate,
            sums,
            *given.scalars(),
            _features(F, S, blocks),
            grad_before.shape[1],
            given.activation,
            BK=1 << (K - 1).bit_length(),
            **blocks,
        )
    return grad_before, sums


@_token_grads.register_fake
def _token_grads_shapes(grad: Tensor, grad_inner: Tensor | None, *arguments: Any) -> tuple[Tensor, Tensor]:
    given = _Given(*arguments)
    T, F, E, R, K = given.sizes
    is_gated = given.fused or given.gate is not None
    before = given.up.new_empty(T, 2 * F if is_gated else F)
    return before, before.new_empty(_splits(given), T, 2 * E * R + K, dtype=torch.float32)


@torch.library.custom_op(
    "moelora::mixture_hidden_factor_grads",
    mutates_args=(),
    schema=f"(Tensor grad, Tensor? grad_inner, {_GIVEN}) -> Tensor",
)
def _factor_grads(grad: Tensor, grad_inner: Tensor | None, *arguments: Any) -> Tensor:
    """The gradients of up's B, gate's B and down's A, one behind the other, for each part of the tokens: [S, ...]."""
    from moelora.ops.triton_feed_forward_kernels import factor_grads

    given = _Given(*arguments)
    sums = _factor_grads_shape(grad, grad_inner, *arguments)
    (T, F, *_), blocks = given.sizes, given.blocks
    tokens = ceil_div(T, len(sums) * blocks["BT"]) * blocks["BT"]
    up, gate, down = (None if part is None else part[0] for part in _factors(given, sums))
    if given.fused and up is not None:
        gate, up = up.chunk(2, 1)
    with torch.cuda.device_of(grad):
        factor_grads[(ceil_div(F, blocks["BX"]), len(sums))](
            grad,
            grad_inner,
            *given.tensors(),
            up,
            gate,
            down,
            *given.scalars(),
            tokens,
            sums.shape[1],
            given.activation,
            **blocks,
        )
    return sums


def _factors(given: _Given, sums: Tensor) -> list[Tensor | None]:
    """The parts of `sums` [S, numbers] as up's B, gate's B and down's A, each [S, ...]."""
    found: list[Tensor | None] = []
    start = 0
    for factor in (given.up_b, given.gate_b, given.down_a):
        if factor is None:
            found.append(None)
        else:
            found.append(sums[:, start : start + factor.numel()].view(-1, *factor.shape))
            start += factor.numel()
    return found


@_factor_grads.register_fake
def _factor_grads_shape(grad: Tensor, grad_inner: Tensor | None, *arguments: Any) -> Tensor:
    given = _Given(*arguments)
    T, F, *_ = given.sizes
    blocks = given.blocks
    factors = [factor for factor in (given.up_b, given.gate_b, given.down_a) if factor is not None]
    # by the sizes alone: the same sums in the same order on every device
    wanted = PROGRAMS // ceil_div(F, blocks["BX"])
    S = torch.sym_max(torch.sym_min(wanted, ceil_div(T, blocks["BT"])), 1)
    dtype = factors[0].dtype if S == 1 else torch.float32
    return grad.new_empty(S, sum(factor.numel() for factor in factors), dtype=dtype)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:10])
    ctx.rest = inputs[10:]


def _backward(ctx: Any, grad: Tensor | None, grad_parts: Tensor | None) -> tuple[Tensor | None, ...]:
    given = _Given(*ctx.saved_tensors, *ctx.rest)
    T, F, E, R, _ = given.sizes
    M = E * R
    if grad is None:
        grad = given.up.new_zeros(T, F)
    if given.down_a is not None:
        # each part has the same gradient, that of their sum
        grad_STM = given.weights.new_zeros(1, T, M) if grad_parts is None else grad_parts
        grad_inner = grad_STM[0].to(given.down_a.dtype).contiguous()
    else:
        grad_inner = None
    tensors = (grad.to(given.up.dtype).contiguous(), grad_inner, *given)
    before, sums = torch.ops.moelora.mixture_hidden_token_grads(*tensors)
    total = sums[0] if sums.shape[0] == 1 else sums.sum(0)
    grad_up, grad_gate = before, None
    if given.gate is not None:
        grad_gate, grad_up = before.chunk(2, 1)
    grad_inners: list[Tensor | None] = [None, None]
    dtypes = [inner.dtype for inner in (given.up_inner, given.gate_inner) if inner is not None]
    if dtypes and given.fused:
        grad_inners[0] = (total[:, :M] + total[:, M : 2 * M]).to(dtypes[0])
    elif dtypes:
        both = total[:, : 2 * M].to(dtypes[0]).chunk(2, 1)
        grad_inners = [
            None if inner is None else part
            for inner, part in zip((given.up_inner, given.gate_inner), both, strict=True)
        ]
    factor_grads: list[Tensor | None] = [None, None, None]
    if any(ctx.needs_input_grad[4:7]):
        parts = torch.ops.moelora.mixture_hidden_factor_grads(*tensors)
        summed = parts if parts.shape[0] == 1 else parts.sum(0, keepdim=True)
        dtype = next(each.dtype for each in (given.up_b, given.gate_b, given.down_a) if each is not None)
        factor_grads = [None if part is None else part[0].to(dtype) for part in _factors(given, summed)]
    return grad_up, grad_gate, *grad_inners, *factor_grads, total[:, 2 * M :], *(None,) * 6


_forward.register_autograd(_backward, setup_context=_keep)

OPERATORS = (
    torch.ops.moelora.mixture_hidden,
    torch.ops.moelora.mixture_hidden_token_grads,
    torch.ops.moelora.mixture_hidden_factor_grads,
)
"""The kernels, as torch calls them."""
