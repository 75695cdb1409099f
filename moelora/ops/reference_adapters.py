"""Naive references of experts that are more than LoRAs: loops over tokens and experts, as in `reference`.

Shape suffixes: T tokens, E experts, D input features, O output features, F features of a linear's input, N adapters, M
inner features of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from moelora.ops.reference import _high


def mlp(x_D: Tensor, layers: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """`W_n relu(... W_1 x + b_1 ...) + b_n` of one token.

    Args:
        x_D: The token.
        layers: (weight, bias) of each linear map.
    """
    h = _high(x_D)
    for i, (weight, bias) in enumerate(layers):
        h = _high(weight) @ (h if i == 0 else torch.stack([each if each > 0 else 0 * each for each in h])) + _high(bias)
    return h


def adapters_and_linear(
    h_TF: Tensor, linear_TO: Tensor, adapters: Sequence[tuple[Tensor, Tensor, Tensor, Tensor]], gates_TE: Tensor
) -> Tensor:
    """MixDA's `sum_n g_n (U_n gelu(D_n h + d_n) + u_n) + g_E W h`.

    Args:
        h_TF: Inputs of the linear.
        linear_TO: Its outputs.
        adapters: (D [M, F], d [M], U [O, M], u [O]) of each adapter.
        gates_TE: The gate's weights; the last one is the linear's.
    """
    rows = []
    for h_F, linear_O, gates_E in zip(_high(h_TF), _high(linear_TO), _high(gates_TE), strict=True):
        row_O = gates_E[-1] * linear_O
        for n, (down, shift_down, up, shift_up) in enumerate(adapters):
            z_M = _high(down) @ h_F + _high(shift_down)
            inner_M = torch.stack([z * (1 + torch.erf(z / math.sqrt(2))) / 2 for z in z_M])
            row_O = row_O + gates_E[n] * (_high(up) @ inner_M + _high(shift_up))
        rows.append(row_O)
    return torch.stack(rows)
