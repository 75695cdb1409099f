"""A feed-forward mixture by masks: the low-rank products of all experts, in plain autograd.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert, K chosen experts of a token, M = E * R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.routing.decision import Routing


def masked_experts(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner_TER: Tensor | None,
    gate_inner_TER: Tensor | None,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    """The input of the frozen down product, and the inner activations of the experts beside it.

    Args:
        up_TF, gate_TF: Outputs of the frozen linears.
        up_inner_TER, gate_inner_TER: `A_e x` of all experts; None for a linear without experts.
        routing: Who computes them.
        block: The frozen block.
        experts: The experts.

    Returns:
        `sum_k w_k a_k` [T, F], and `scaling * w_e A2_e a_e` [T, E, R], 0 where e was not chosen (None without experts
        on down).
    """
    masks_KTE = None if routing.ids_TK is None else F.one_hot(routing.ids_TK.t(), routing.num_experts)

    def pre_activation(base_TF: Tensor, inner_TER: Tensor | None, factors: Factors | None, k: int) -> Tensor:
        if inner_TER is None or factors is None:
            return base_TF
        if masks_KTE is None:
            delta_TF = F.linear(inner_TER[:, k if inner_TER.shape[1] > 1 else 0] * factors.scaling, factors.b_EOR[k])
        else:
            mask_TE1 = (masks_KTE[k] * factors.scaling).to(inner_TER.dtype).unsqueeze(-1)
            delta_TF = (inner_TER * mask_TE1).flatten(1) @ factors.weight_MO()
        return base_TF + delta_TF.to(base_TF.dtype)

    # summed in the weights' fp32: rounded weights of sum one would not give equal rows again
    hidden_TF: Tensor | None = None
    inners: list[Tensor] = []
    down = experts.down
    for k in range(routing.num_choices):
        weight_T1 = routing.weights_TK[:, k : k + 1]
        up_k = pre_activation(up_TF, up_inner_TER, experts.up, k)
        gate_k = None if gate_TF is None else pre_activation(gate_TF, gate_inner_TER, experts.gate, k)
        act_k = block.activate(up_k, gate_k)
        if block.hidden_dropout is not None:
            act_k = block.hidden_dropout(act_k)
        weighted = act_k * weight_T1
        hidden_TF = weighted if hidden_TF is None else hidden_TF + weighted
        if down is None:
            continue
        dropped = (act_k if experts.dropout is None else experts.dropout(act_k)).to(down.a_ERD.dtype)
        if masks_KTE is None:
            inner_TR = F.linear(dropped, down.expanded_a_ERD()[k])
            inners.append(inner_TR * (weight_T1 * down.scaling).to(inner_TR.dtype))
        else:
            inner_TER = down.inner_TER(dropped)
            weight_TE = masks_KTE[k] * (weight_T1 * down.scaling)
            inners.append(inner_TER * weight_TE.to(inner_TER.dtype).unsqueeze(-1))
    assert hidden_TF is not None
    hidden_TF = hidden_TF.to(up_TF.dtype)
    if not inners:
        return hidden_TF, None
    return hidden_TF, torch.stack(inners, 1) if masks_KTE is None else torch.stack(inners).sum(0)
