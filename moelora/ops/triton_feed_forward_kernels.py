# Triton reads annotations as code that it compiles, so there are none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton's kernels of a mixture on a feed-forward block; `triton_feed_forward` calls them.

A program has a tile of tokens and a block of inner features, and goes through each token's choices one after the other:
the ranks of the chosen expert are what a mask leaves of all experts' ranks, so that one product with all factors serves
tokens of any experts. The outputs of the frozen linears are read once, however many experts a token has, and nothing
of an expert is written. Sums are fp32; what the frozen block would round (its activation, and the product with up) is
rounded. Tensors are contiguous but for the rows of up, gate and their gradients, and for the experts of their B.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K choices of a token, M = E * R, X a block
of F. Sizes of blocks are BT, BM, BX, BK, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from moelora.ops.triton_kernels import _block, _dropped


@triton.jit
def _activated(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        y = x * tl.sigmoid(x)
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, x)  # lets NaN pass, as torch does
    elif ACTIVATION == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        # 1 + tanh(z) = 2 sigmoid(2z)
        y = x * tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return y


@triton.jit
def _slope(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACTIVATION == "relu":
        y = tl.where(x <= 0.0, 0.0, 1.0)
    elif ACTIVATION == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        s = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    return y


@triton.jit
def _choice(ids, weights, t, m, j, T, R, K):
    """Which ranks are those of each token's choice j, and its weight."""
    at = t.to(tl.int64) * K + j
    e_T = tl.load(ids + at, mask=t < T, other=-1).to(tl.int32)
    return (m // R)[None, :] == e_T[:, None], tl.load(weights + at, mask=t < T, other=0.0).to(tl.float32)[:, None]


@triton.jit
def _factors_MX(b, m, f, stride, F, E, R):
    """B of all experts as one matrix, from rows of R each, experts `stride` apart; None of a linear without experts."""
    tile_MX = None
    if b is not None:
        at = b + (m // R * stride + m % R)[:, None] + (f * R)[None, :]
        tile_MX = tl.load(at, mask=(m < E * R)[:, None] & (f < F)[None, :], other=0.0)
    return tile_MX


@triton.jit
def _wide(start, stride, row, column, num_rows, num_columns):
    """`_block` in fp32; None where there is none."""
    tile_TX = _block(start, stride, row, column, num_rows, num_columns)
    if tile_TX is not None:
        tile_TX = tile_TX.to(tl.float32)
    return tile_TX


@triton.jit
def _own(inner_TM, is_own_TM):
    """The chosen experts' part of inner activations, or of their gradient."""
    return tl.where(is_own_TM, inner_TM, 0.0).to(inner_TM.dtype)


@triton.jit
def _plus(base_TX, inner_TM, b_MX, is_own_TM, scale):
    """A pre-activation, if there is such a linear: the frozen output, and what the chosen expert adds, if any."""
    y_TX = base_TX
    if b_MX is not None:
        y_TX += scale * tl.dot(_own(inner_TM, is_own_TM), b_MX, input_precision="ieee")
    return y_TX


@triton.jit
def _hidden(up_TX, gate_TX, ACTIVATION: tl.constexpr, dtype: tl.constexpr):
    """What the block makes of pre-activations, rounded where it rounds, and the activation alone."""
    if gate_TX is None:
        active_TX = _activated(up_TX, ACTIVATION).to(dtype).to(tl.float32)
        a_TX = active_TX
    else:
        active_TX = _activated(gate_TX, ACTIVATION).to(dtype).to(tl.float32)
        a_TX = (active_TX * up_TX.to(dtype).to(tl.float32)).to(dtype).to(tl.float32)
    return a_TX, active_TX


@triton.jit
def _grad_of_hidden(grad_TX, grad_inner_TM, a_MX, is_own_TM, scale, seed, row_T, f, F, p):
    """The gradient of a choice's hidden units, before its weight: through the frozen down, and the expert's A on it."""
    y_TX = grad_TX
    if a_MX is not None:
        through_TX = scale * tl.dot(_own(grad_inner_TM, is_own_TM), a_MX, input_precision="ieee")
        y_TX += _dropped(through_TX, seed, row_T, f, F, p)
    return y_TX


@triton.jit
def _grads_before(grad_a_TX, up_TX, gate_TX, active_TX, ACTIVATION: tl.constexpr):
    """The gradients of the pre-activations of up and gate; without a gate the second is the first again."""
    if gate_TX is None:
        grad_up_TX = grad_a_TX * _slope(up_TX, ACTIVATION)
        grad_gate_TX = grad_up_TX
    else:
        grad_up_TX = grad_a_TX * active_TX
        grad_gate_TX = grad_a_TX * up_TX * _slope(gate_TX, ACTIVATION)
    return grad_up_TX, grad_gate_TX


@triton.jit
def _to_inner(sum_TM, grad_TX, b_MX, is_own_TM):
    """`sum_TM` and the gradient of the inner activations that a pre-activation's gradient gives."""
    product_TM = tl.dot(grad_TX.to(b_MX.dtype), tl.trans(b_MX), input_precision="ieee")
    return sum_TM + tl.where(is_own_TM, product_TM, 0.0)


@triton.jit
def _to_factor(sum_MX, inner_TM, is_own_TM, grad_TX):
    """`sum_MX` and the chosen experts' inner activations times a gradient, summed over the tokens."""
    own_MT = tl.trans(_own(inner_TM, is_own_TM))
    return tl.dot(own_MT, grad_TX.to(inner_TM.dtype), sum_MX, input_precision="ieee")


@triton.jit
def forward(
    up,
    gate,
    up_inner,
    gate_inner,
    up_b,
    gate_b,
    down_a,
    weights,
    ids,
    seed,
    y,
    inner,
    T,
    F,
    E,
    R,
    K,
    row_stride,
    expert_stride,
    up_scale,
    gate_scale,
    down_scale,
    p,
    features,
    ACTIVATION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
):
    """`sum_k w_k a_k`, and for each part of `features` inner features, by expert, `scale * w_k A_k dropout(a_k)`.

    Grid: tiles of tokens, parts.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    M = E * R
    last = tl.minimum(F, (part + 1) * features)
    dtype = y.dtype.element_ty
    up_inner_TM = _block(up_inner, M, t, m, T, M)
    gate_inner_TM = _block(gate_inner, M, t, m, T, M)
    sum_TM = tl.zeros([BT, BM], tl.float32)
    for first in range(part * features, last, BX):
        f = first + tl.arange(0, BX)
        base_up_TX = _wide(up, row_stride, t, f, T, last)
        base_gate_TX = _wide(gate, row_stride, t, f, T, last)
        up_b_MX = _factors_MX(up_b, m, f, expert_stride, last, E, R)
        gate_b_MX = _factors_MX(gate_b, m, f, expert_stride, last, E, R)
        a_MX = _block(down_a, F, m, f, M, last)
        y_TX = tl.zeros([BT, BX], tl.float32)
        for j in range(K):
            is_own_TM, w_T1 = _choice(ids, weights, t, m, j, T, R, K)
            up_TX = _plus(base_up_TX, up_inner_TM, up_b_MX, is_own_TM, up_scale)
            gate_TX = _plus(base_gate_TX, gate_inner_TM, gate_b_MX, is_own_TM, gate_scale)
            a_TX, _ = _hidden(up_TX, gate_TX, ACTIVATION, dtype)
            y_TX += w_T1 * a_TX
            if down_a is not None:
                seen_TX = _dropped(a_TX, seed, t * K + j, f, F, p)
                sum_TM = _to_inner(sum_TM, w_T1 * seen_TX, a_MX, is_own_TM)
        at = t.to(tl.int64)[:, None] * F + f[None, :]
        tl.store(y + at, y_TX.to(dtype), mask=(t < T)[:, None] & (f < last)[None, :])
    if down_a is not None:
        at = (part.to(tl.int64) * T + t)[:, None] * M + m[None, :]
        mask = (t < T)[:, None] & (m < M)[None, :]
        tl.store(inner + at, (down_scale * sum_TM).to(inner.dtype.element_ty), mask=mask)


@triton.jit
def token_grads(
    grad,
    grad_inner,
    up,
    gate,
    up_inner,
    gate_inner,
    up_b,
    gate_b,
    down_a,
    weights,
    ids,
    seed,
    grad_up,
    grad_gate,
    sums,
    T,
    F,
    E,
    R,
    K,
    row_stride,
    expert_stride,
    up_scale,
    gate_scale,
    down_scale,
    p,
    features,
    grad_row_stride,
    ACTIVATION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
    BK: tl.constexpr,
):
    """The gradients of up and gate; for each part of the inner features, of their inner activations and of the weights.

    `sums` has rows of 2M + K: up's inner activations, gate's, and the weights. Grid: tiles of tokens, parts.
    """
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    k = tl.arange(0, BK)
    M = E * R
    last = tl.minimum(F, (part + 1) * features)
    dtype = up.dtype.element_ty
    up_inner_TM = _block(up_inner, M, t, m, T, M)
    gate_inner_TM = _block(gate_inner, M, t, m, T, M)
    grad_inner_TM = _block(grad_inner, M, t, m, T, M)
    sum_up_TM = tl.zeros([BT, BM], tl.float32)
    sum_gate_TM = tl.zeros([BT, BM], tl.float32)
    sum_TK = tl.zeros([BT, BK], tl.float32)
    for first in range(part * features, last, BX):
        f = first + tl.arange(0, BX)
        grad_TX = _wide(grad, F, t, f, T, last)
        base_up_TX = _wide(up, row_stride, t, f, T, last)
        base_gate_TX = _wide(gate, row_stride, t, f, T, last)
        up_b_MX = _factors_MX(up_b, m, f, expert_stride, last, E, R)
        gate_b_MX = _factors_MX(gate_b, m, f, expert_stride, last, E, R)
        a_MX = _block(down_a, F, m, f, M, last)
        grad_up_TX = tl.zeros([BT, BX], tl.float32)
        grad_gate_TX = tl.zeros([BT, BX], tl.float32)
        for j in range(K):
            is_own_TM, w_T1 = _choice(ids, weights, t, m, j, T, R, K)
            up_TX = _plus(base_up_TX, up_inner_TM, up_b_MX, is_own_TM, up_scale)
            gate_TX = _plus(base_gate_TX, gate_inner_TM, gate_b_MX, is_own_TM, gate_scale)
            a_TX, active_TX = _hidden(up_TX, gate_TX, ACTIVATION, dtype)
            grad_a_TX = _grad_of_hidden(grad_TX, grad_inner_TM, a_MX, is_own_TM, down_scale, seed, t * K + j, f, F, p)
            new_up_TX, new_gate_TX = _grads_before(w_T1 * grad_a_TX, up_TX, gate_TX, active_TX, ACTIVATION)
            grad_up_TX += new_up_TX
            grad_gate_TX += new_gate_TX
            if up_b is not None:
                sum_up_TM = _to_inner(sum_up_TM, new_up_TX, up_b_MX, is_own_TM)
            if gate_b is not None:
                sum_gate_TM = _to_inner(sum_gate_TM, new_gate_TX, gate_b_MX, is_own_TM)
            sum_TK += tl.where((k == j)[None, :], tl.sum(grad_a_TX * a_TX, 1)[:, None], 0.0)
        at = t.to(tl.int64)[:, None] * grad_row_stride + f[None, :]
        mask = (t < T)[:, None] & (f < last)[None, :]
        tl.store(grad_up + at, grad_up_TX.to(dtype), mask=mask)
        if gate is not None:
            tl.store(grad_gate + at, grad_gate_TX.to(dtype), mask=mask)
    start = sums + (part.to(tl.int64) * T + t)[:, None] * (2 * M + K)
    mask = (t < T)[:, None] & (m < M)[None, :]
    tl.store(start + m[None, :], up_scale * sum_up_TM, mask=mask)
    tl.store(start + M + m[None, :], gate_scale * sum_gate_TM, mask=mask)
    tl.store(start + 2 * M + k[None, :], sum_TK, mask=(t < T)[:, None] & (k < K)[None, :])


@triton.jit
def factor_grads(
    grad,
    grad_inner,
    up,
    gate,
    up_inner,
    gate_inner,
    up_b,
    gate_b,
    down_a,
    weights,
    ids,
    seed,
    up_sums,
    gate_sums,
    down_sums,
    T,
    F,
    E,
    R,
    K,
    row_stride,
    expert_stride,
    up_scale,
    gate_scale,
    down_scale,
    p,
    tokens,
    part_stride,
    ACTIVATION: tl.constexpr,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
):
    """The gradients of up's and gate's B and of down's A. Grid: blocks of inner features, parts of `tokens` tokens.

    Each part has sums of its own, `part_stride` apart: no atomic addition, whose order would be another in each run.
    """
    f = tl.program_id(0) * BX + tl.arange(0, BX)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    M = E * R
    last = tl.minimum(T, (part + 1) * tokens)
    dtype = up.dtype.element_ty
    up_b_MX = _factors_MX(up_b, m, f, expert_stride, F, E, R)
    gate_b_MX = _factors_MX(gate_b, m, f, expert_stride, F, E, R)
    a_MX = _block(down_a, F, m, f, M, F)
    sum_up_MX = tl.zeros([BM, BX], tl.float32)
    sum_gate_MX = tl.zeros([BM, BX], tl.float32)
    sum_a_MX = tl.zeros([BM, BX], tl.float32)
    for first in range(part * tokens, last, BT):
        t = first + tl.arange(0, BT)
        grad_TX = _wide(grad, F, t, f, last, F)
        base_up_TX = _wide(up, row_stride, t, f, last, F)
        base_gate_TX = _wide(gate, row_stride, t, f, last, F)
        up_inner_TM = _block(up_inner, M, t, m, last, M)
        gate_inner_TM = _block(gate_inner, M, t, m, last, M)
        grad_inner_TM = _block(grad_inner, M, t, m, last, M)
        for j in range(K):
            is_own_TM, w_T1 = _choice(ids, weights, t, m, j, last, R, K)
            up_TX = _plus(base_up_TX, up_inner_TM, up_b_MX, is_own_TM, up_scale)
            gate_TX = _plus(base_gate_TX, gate_inner_TM, gate_b_MX, is_own_TM, gate_scale)
            a_TX, active_TX = _hidden(up_TX, gate_TX, ACTIVATION, dtype)
            grad_a_TX = _grad_of_hidden(grad_TX, grad_inner_TM, a_MX, is_own_TM, down_scale, seed, t * K + j, f, F, p)
            new_up_TX, new_gate_TX = _grads_before(w_T1 * grad_a_TX, up_TX, gate_TX, active_TX, ACTIVATION)
            if up_b is not None:
                sum_up_MX = _to_factor(sum_up_MX, up_inner_TM, is_own_TM, new_up_TX)
            if gate_b is not None:
                sum_gate_MX = _to_factor(sum_gate_MX, gate_inner_TM, is_own_TM, new_gate_TX)
            if down_a is not None:
                seen_TX = _dropped(a_TX, seed, t * K + j, f, F, p)
                sum_a_MX = _to_factor(sum_a_MX, grad_inner_TM, is_own_TM, w_T1 * seen_TX)
    start = part.to(tl.int64) * part_stride
    mask = (m < M)[:, None] & (f < F)[None, :]
    at_b = start + (m // R * expert_stride + m % R)[:, None] + (f * R)[None, :]
    if up_b is not None:
        tl.store(up_sums + at_b, (up_scale * sum_up_MX).to(up_sums.dtype.element_ty), mask=mask)
    if gate_b is not None:
        tl.store(gate_sums + at_b, (gate_scale * sum_gate_MX).to(gate_sums.dtype.element_ty), mask=mask)
    if down_a is not None:
        at_a = start + m[:, None] * F + f[None, :]
        tl.store(down_sums + at_a, (down_scale * sum_a_MX).to(down_sums.dtype.element_ty), mask=mask)
