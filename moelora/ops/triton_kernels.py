# Triton reads annotations as code that it compiles, so there are none but its own.
# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton's kernels of a mixture on one linear; `triton_linear` calls them.

A program has a tile of tokens and all ranks of all experts. The tile's inner activations stay in registers between the
two products, so that nothing of size [T, M] is read back in the forward pass and no factor is copied. Sums are fp32.
Tensors are contiguous.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, M = E * R, X a block of
D or O. Sizes of blocks are BT, BM, BX, powers of two.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _dropped(values_TX, seed, t, d, D, p):
    """Zeros with probability p, the same ones at each call: a number of Philox's for each element's place.

    Without a seed there are none.
    """
    if seed is not None:
        uniform = tl.rand(tl.load(seed), t[:, None] * D + d[None, :])
        values_TX = tl.where(uniform < p, 0.0, values_TX).to(values_TX.dtype)
    return values_TX


@triton.jit
def _gate_TM(gates, t, m, T, E, R):
    """The weight of each rank's expert."""
    place = t.to(tl.int64)[:, None] * E + (m // R)[None, :]
    return tl.load(gates + place, mask=(t < T)[:, None] & (m < E * R)[None, :], other=0.0).to(tl.float32)


@triton.jit
def _block(start, stride, row, column, num_rows, num_columns):
    """Rows and columns of a matrix of stored rows, 0 outside it; None of no matrix."""
    tile = None
    if start is not None:
        at = start + row.to(tl.int64)[:, None] * stride + column[None, :]
        tile = tl.load(at, mask=(row < num_rows)[:, None] & (column < num_columns)[None, :], other=0.0)
    return tile


@triton.jit
def _b_MX(b, m, o, O, E, R):
    """B of all experts as one matrix, from [E, O, R]."""
    at = b + (m // R * O * R + m % R)[:, None] + (o * R)[None, :]
    return tl.load(at, mask=(m < E * R)[:, None] & (o < O)[None, :], other=0.0)


@triton.jit
def forward(
    x,
    a,
    b,
    gates,
    base,
    seed,
    y,
    inner,
    T,
    D,
    O,
    E,
    R,
    scale,
    p,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
):
    """`base + scale * B_cat (g * (A_cat dropout(x)))` and the inner activations. Grid: tiles of tokens."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m = tl.arange(0, BM)
    M = E * R
    sum_TM = tl.zeros([BT, BM], tl.float32)
    for first in range(0, D, BX):
        d = first + tl.arange(0, BX)
        x_TX = _block(x, D, t, d, T, D)
        x_TX = _dropped(x_TX, seed, t, d, D, p)
        sum_TM = tl.dot(x_TX, tl.trans(_block(a, D, m, d, M, D)), sum_TM, input_precision="ieee")
    inner_TM = sum_TM.to(inner.dtype.element_ty)
    row = t.to(tl.int64)[:, None]
    tl.store(inner + row * M + m[None, :], inner_TM, mask=(t < T)[:, None] & (m < M)[None, :])
    if gates is not None:
        inner_TM = (inner_TM * _gate_TM(gates, t, m, T, E, R)).to(inner.dtype.element_ty)
    for first in range(0, O, BX):
        o = first + tl.arange(0, BX)
        y_TX = tl.dot(inner_TM, _b_MX(b, m, o, O, E, R), input_precision="ieee") * scale
        if base is not None:
            y_TX += _block(base, O, t, o, T, O)
        tl.store(y + row * O + o[None, :], y_TX.to(y.dtype.element_ty), mask=(t < T)[:, None] & (o < O)[None, :])


@triton.jit
def token_grads(
    grad,
    a,
    b,
    gates,
    inner,
    seed,
    grad_inner,
    grad_x,
    grad_gates,
    T,
    D,
    O,
    E,
    R,
    scale,
    p,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
):
    """The gradients of the inner activations, of the gates and of the tokens. Grid: tiles of tokens."""
    t = tl.program_id(0) * BT + tl.arange(0, BT)
    m = tl.arange(0, BM)
    M = E * R
    dtype = inner.dtype.element_ty
    grad_TM = tl.zeros([BT, BM], tl.float32)
    for first in range(0, O, BX):
        o = first + tl.arange(0, BX)
        grad_TX = _block(grad, O, t, o, T, O).to(dtype)
        grad_TM = tl.dot(grad_TX, tl.trans(_b_MX(b, m, o, O, E, R)), grad_TM, input_precision="ieee")
    grad_TM *= scale
    row = t.to(tl.int64)[:, None]
    if grad_gates is not None:
        product_TM = grad_TM * _block(inner, M, t, m, T, M)
        # the sum over each expert's ranks as a product with zeros and ones, 16 experts at once
        for first in range(0, E, 16):
            e = first + tl.arange(0, 16)
            is_of_expert = ((m // R)[:, None] == e[None, :]).to(tl.float32)
            sum_TE = tl.dot(product_TM, is_of_expert, input_precision="ieee")
            tl.store(grad_gates + row * E + e[None, :], sum_TE, mask=(t < T)[:, None] & (e < E)[None, :])
    if gates is not None:
        grad_TM *= _gate_TM(gates, t, m, T, E, R)
    grad_inner_TM = grad_TM.to(dtype)
    tl.store(grad_inner + row * M + m[None, :], grad_inner_TM, mask=(t < T)[:, None] & (m < M)[None, :])
    if grad_x is not None:
        for first in range(0, D, BX):
            d = first + tl.arange(0, BX)
            x_TX = tl.dot(grad_inner_TM, _block(a, D, m, d, M, D), input_precision="ieee")
            x_TX = _dropped(x_TX, seed, t, d, D, p)
            tl.store(grad_x + row * D + d[None, :], x_TX.to(dtype), mask=(t < T)[:, None] & (d < D)[None, :])


@triton.jit
def factor_grads(
    grad,
    x,
    gates,
    inner,
    grad_inner,
    seed,
    sums,
    T,
    D,
    O,
    E,
    R,
    scale,
    p,
    tokens,
    BT: tl.constexpr,
    BM: tl.constexpr,
    BX: tl.constexpr,
):
    """The gradients of A and B. Grid: blocks of D and then of O, parts of `tokens` tokens.

    Each part has a sum of its own, A's [E, R, D] and behind it B's [E, O, R]: no atomic addition, whose order would be
    another in each run.
    """
    blocks_of_a = tl.cdiv(D, BX)
    block = tl.program_id(0)
    part = tl.program_id(1)
    m = tl.arange(0, BM)
    M = E * R
    dtype = inner.dtype.element_ty
    last = tl.minimum(T, (part + 1) * tokens)
    sums += part.to(tl.int64) * M * (D + O)
    sum_MX = tl.zeros([BM, BX], tl.float32)
    if block < blocks_of_a:
        d = block * BX + tl.arange(0, BX)
        for first in range(part * tokens, last, BT):
            t = first + tl.arange(0, BT)
            x_TX = _block(x, D, t, d, last, D)
            x_TX = _dropped(x_TX, seed, t, d, D, p)
            grad_inner_TM = _block(grad_inner, M, t, m, last, M)
            sum_MX = tl.dot(tl.trans(grad_inner_TM), x_TX, sum_MX, input_precision="ieee")
        at = m[:, None] * D + d[None, :]
        tl.store(sums + at, sum_MX.to(sums.dtype.element_ty), mask=(m < M)[:, None] & (d < D)[None, :])
    else:
        o = (block - blocks_of_a) * BX + tl.arange(0, BX)
        for first in range(part * tokens, last, BT):
            t = first + tl.arange(0, BT)
            inner_TM = _block(inner, M, t, m, last, M)
            if gates is not None:
                inner_TM = (inner_TM * _gate_TM(gates, t, m, last, E, R)).to(dtype)
            grad_TX = _block(grad, O, t, o, last, O).to(dtype)
            sum_MX = tl.dot(tl.trans(inner_TM), grad_TX, sum_MX, input_precision="ieee")
        at = M * D + (m // R * O * R + m % R)[:, None] + (o * R)[None, :]
        sum_MX *= scale
        tl.store(sums + at, sum_MX.to(sums.dtype.element_ty), mask=(m < M)[:, None] & (o < O)[None, :])
