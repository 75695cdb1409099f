"""The naive reference of a feed-forward block with a mixture on each of its linears, beside `moelora.ops.reference`.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moelora.ops.reference import feed_forward, mixture_linear


def feed_forward_of_mixtures(
    x_TD: Tensor,
    gates_TE: Tensor,
    linears: Mapping[str, tuple[Tensor, Tensor | None]],
    loras: Mapping[str, tuple[Tensor, Tensor, float]],
    kind: str,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """At each linear of the block `y = W x + b + scaling * sum_e g_te B_e A_e x`, by the same weights.

    Args:
        x_TD: Tokens.
        gates_TE: Weights of the experts.
        linears, loras, kind, activation: As in `reference.feed_forward_expert`.

    Returns:
        y_TD, fp32.
    """
    rows = []
    for x_D, gates_E in zip(x_TD.float(), gates_TE.float(), strict=True):

        def linear(role: str, x: Tensor, gates_E: Tensor = gates_E) -> Tensor:
            weight, bias = linears[role]
            y = weight.float() @ x
            y = y if bias is None else y + bias.float()
            if role in loras:
                a_ERD, b_EOR, scaling = loras[role]
                y = y + mixture_linear(x[None], a_ERD, b_EOR, gates_E[None], scaling)[0]
            return y

        rows.append(feed_forward(x_D, linear, kind, activation))
    return torch.stack(rows)
