"""Naive references of experts that are more than LoRAs: loops over tokens and experts, as in `reference`.

Shape suffixes: T tokens, E experts, D input features, O output features, F features of a linear's input, N adapters, M
inner features of an adapter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

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


def matrix_product(left_AI: Tensor, central_ARJB: Tensor, right_BK: Tensor) -> Tensor:
    """MPOE's matrix of one expert [R, I J K], element by element: `sum_ab L[a, i] C[a, r, j, b] Q[b, k]`."""
    A, R, J, B = central_ARJB.shape
    rows = []
    for r in range(R):
        row = [
            sum(left_AI[a, i] * central_ARJB[a, r, j, b] * right_BK[b, k] for a in range(A) for b in range(B))
            for i in range(left_AI.shape[1])
            for j in range(J)
            for k in range(right_BK.shape[1])
        ]
        rows.append(torch.stack([torch.as_tensor(each) for each in row]))
    return torch.stack(rows)


def rounds_of_experts(
    x_TD: Tensor,
    a_ERD: Tensor,
    b_EOR: Tensor,
    state: Mapping[str, Tensor],
    route: Callable[[Tensor], Tensor],
    rounds: int,
) -> Tensor:
    """What the experts of a recurrent routing add, without their scaling: `sum_e g_Te B_e (A_e x + V h_T)`.

    Args:
        x_TD: Tokens.
        a_ERD, b_EOR: The experts.
        state: "start" S [H, D], "back" V [R, H], and "input" [3 H, R], "hidden" [3 H, H], "input_shift" and
            "hidden_shift" [3 H] of the GRU: of reset, update and candidate.
        route: The weights [E] that a state [H] is routed with.
        rounds: Number of rounds.
    """
    rows = []
    for x_D in _high(x_TD):
        h_H = state["start"] @ x_D
        for t in range(rounds):
            gates_E = route(h_H)
            nodes = [a_RD @ x_D + state["back"] @ h_H for a_RD in a_ERD]
            if t == rounds - 1:
                rows.append(sum(g * (b_OR @ n_R) for g, b_OR, n_R in zip(gates_E, b_EOR, nodes, strict=True)))
                break
            message_R = sum(g * n_R for g, n_R in zip(gates_E, nodes, strict=True))
            i_H3 = (state["input"] @ message_R + state["input_shift"]).view(3, -1)
            h_H3 = (state["hidden"] @ h_H + state["hidden_shift"]).view(3, -1)
            reset_H, update_H = (1 / (1 + torch.exp(-i_H3[g] - h_H3[g])) for g in (0, 1))
            candidate_H = torch.tanh(i_H3[2] + reset_H * h_H3[2])
            h_H = candidate_H + update_H * (h_H - candidate_H)
    return torch.stack(rows)
