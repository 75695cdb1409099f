"""A feed-forward mixture for a handful of choices: each one's own factors are copied.

Shape suffixes: T tokens, F inner features, D model features, R rank of one expert, K chosen experts of a token, N = T
* K choices.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.routing.decision import Routing


def gathered_experts(
    x_TD: Tensor,
    up_TF: Tensor,
    gate_TF: Tensor | None,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    """The input of the frozen down product, and what the experts add behind it: few operations, for few choices.

    Args:
        x_TD: Tokens, after LoRA dropout.
        up_TF, gate_TF: Outputs of the frozen linears.
        routing: Who computes them; not dense.
        block: The frozen block.
        experts: The experts.

    Returns:
        hidden_TF in the block's dtype, and delta_TD in the experts' (None without experts on down).
    """
    assert routing.ids_TK is not None
    T, K = routing.ids_TK.shape
    ids_N = routing.ids_TK.reshape(-1)

    def of_choices(rows_TF: Tensor) -> Tensor:
        return rows_TF.unsqueeze(1).expand(-1, K, -1).reshape(T * K, 1, rows_TF.shape[-1])

    # sums of products rather than batched products where they are faster: a matrix product has a fixed cost per call
    def pre_activation(base_TF: Tensor, factors: Factors | None) -> Tensor:
        base_N1F = of_choices(base_TF)
        if factors is None:
            return base_N1F
        a_NRD = factors.expanded_a_ERD().index_select(0, ids_N)
        b_NRF = factors.b_EOR.index_select(0, ids_N).transpose(1, 2)
        inner_N1R = (a_NRD * of_choices(x_TD.to(a_NRD.dtype))).sum(-1).unsqueeze(1)
        if base_N1F.dtype == b_NRF.dtype:
            return torch.baddbmm(base_N1F, inner_N1R, b_NRF, alpha=factors.scaling)
        return base_N1F + (torch.bmm(inner_N1R, b_NRF) * factors.scaling).to(base_N1F.dtype)

    up_N1F = pre_activation(up_TF, experts.up)
    gate_N1F = None if gate_TF is None else pre_activation(gate_TF, experts.gate)
    act_N1F = block.activate(up_N1F, gate_N1F)
    weights_TK1 = routing.weights_TK.unsqueeze(-1)
    # summed in the weights' fp32: rounded weights of sum one would not give equal rows again
    hidden_TF = (act_N1F.view(T, K, act_N1F.shape[-1]) * weights_TK1).sum(1).to(act_N1F.dtype)
    down = experts.down
    if down is None:
        return hidden_TF, None
    dropped_N1F = act_N1F if experts.dropout is None else experts.dropout(act_N1F)
    a_NRF, b_NDR = down.expanded_a_ERD().index_select(0, ids_N), down.b_EOR.index_select(0, ids_N)
    inner_NR = (a_NRF * dropped_N1F.to(a_NRF.dtype)).sum(-1)
    inner_NR = inner_NR * (weights_TK1.view(-1, 1) * down.scaling).to(inner_NR.dtype)
    return hidden_TF, torch.bmm(b_NDR, inner_NR.unsqueeze(-1)).view(T, K, b_NDR.shape[1]).sum(1)
