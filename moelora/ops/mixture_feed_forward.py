"""A mixture of whole feed-forward experts around one frozen block, in one pass over its weights.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, M = E * R, K chosen
experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.routing.decision import Routing


@dataclass(frozen=True, eq=False)
class FrozenFeedForward:
    """The frozen parts of a feed-forward block, as functions; `down` includes its bias.

    Attributes:
        kind: "gated": `down(act(gate x) * up x)`; "plain": `down(act(up x))`; "fused": `up` gives gate and up halves.
        up, down: The linears.
        gate: The gate linear of a gated block.
        activation: act.
        down_bias: Bias of `down`, if it has one.
        hidden_dropout: The block's own dropout between activation and `down`.
        output_dropout: The block's own dropout behind `down`.
    """

    kind: str
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None = None
    down_bias: Tensor | None = None
    hidden_dropout: Callable[[Tensor], Tensor] | None = None
    output_dropout: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, eq=False)
class FeedForwardExperts:
    """The experts of one mixture: (A [E, R, in], B [E, out, R]) of each linear that has any.

    Attributes:
        up, down, gate: The pairs; None for a linear without experts.
        scaling: LoRA's scaling.
        dropout: LoRA dropout, applied to the input of each A.
    """

    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    scaling: float
    dropout: Callable[[Tensor], Tensor]


class _Selected:
    """The LoRA of whichever expert a token's k-th choice is, for one linear.

    `A_cat x` is computed once for all experts; choice k then keeps the R rows of its expert (a mask, no gather) and one
    product with `B_cat` gives the deltas of all tokens. With dense routing choice k is expert k for every token.
    """

    def __init__(self, pair: tuple[Tensor, Tensor], masks_KTE: Tensor | None) -> None:
        self.a_ERD, self.b_EOR = pair
        self.masks_KTE = masks_KTE

    def inner(self, x_TD: Tensor) -> Tensor:
        E, R, D = self.a_ERD.shape
        return F.linear(x_TD, self.a_ERD.view(E * R, D)).unflatten(-1, (E, R))

    def inner_of_choice(self, inner_TER: Tensor, k: int) -> Tensor:
        """Rows of the k-th choice: [T, M] masked, or [T, R] with dense routing."""
        if self.masks_KTE is None:
            return inner_TER[:, k]
        return (inner_TER * self.masks_KTE[k].to(inner_TER.dtype).unsqueeze(-1)).flatten(-2)

    def outer(self, inner: Tensor, k: int) -> Tensor:
        E, O, R = self.b_EOR.shape
        if self.masks_KTE is None:
            return F.linear(inner, self.b_EOR[k])
        return F.linear(inner, self.b_EOR.transpose(0, 1).reshape(O, E * R))


def mixture_feed_forward(
    x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
) -> Tensor:
    """`sum_k w_k E_{e_k}(x)`, MixLoRA's mixture (arXiv 2404.15159), with every frozen linear evaluated once.

    `gate` and `up` are shared by all experts (as in the paper), and so is `down`: it is linear, so `sum_k w_k W2 a_k =
    W2 (sum_k w_k a_k)` (identity I3). Only the low-rank parts, the activation and the products are done per choice. The
    bias of `down` is scaled by the sum of the weights. Equal to `reference.mixture_feed_forward`.

    Args:
        x_TD: Tokens.
        routing: Who computes them.
        block: The frozen block.
        experts: The experts.

    Returns:
        y_TD in the dtype that the block's `down` gives.
    """
    masks_KTE = None
    if routing.ids_TK is not None:
        # [K, T, E], scaled: LoRA's factor rides on the masks for free
        masks_KTE = F.one_hot(routing.ids_TK.t(), routing.num_experts) * experts.scaling
    up_base, gate_base = block.up(x_TD), block.gate(x_TD) if block.gate is not None else None
    x_dropped = _cast(experts.dropout(x_TD), experts)
    up = _Selected(experts.up, masks_KTE) if experts.up is not None else None
    gate = _Selected(experts.gate, masks_KTE) if experts.gate is not None else None
    down = _Selected(experts.down, masks_KTE) if experts.down is not None else None
    up_inner = up.inner(x_dropped) if up is not None else None
    gate_inner = gate.inner(x_dropped) if gate is not None else None

    hidden_TF: Tensor | None = None
    down_delta: Tensor | None = None
    for k in range(routing.num_choices):
        weight_T1 = routing.weights_TK[:, k : k + 1]
        up_k = _add_choice(up_base, up, up_inner, k, experts.scaling)
        if block.kind == "gated":
            assert gate_base is not None
            act_k = block.activation(_add_choice(gate_base, gate, gate_inner, k, experts.scaling)) * up_k
        elif block.kind == "fused":
            gate_half, up_half = up_k.chunk(2, dim=-1)
            act_k = block.activation(gate_half) * up_half
        else:
            act_k = block.activation(up_k)
        if block.hidden_dropout is not None:
            act_k = block.hidden_dropout(act_k)
        weighted = act_k * weight_T1.to(act_k.dtype)
        hidden_TF = weighted if hidden_TF is None else hidden_TF + weighted
        if down is not None:
            inner_k = down.inner_of_choice(down.inner(_cast(experts.dropout(act_k), experts)), k)
            inner_k = inner_k * weight_T1.to(inner_k.dtype)
            if masks_KTE is None:
                delta_k = down.outer(inner_k * experts.scaling, k)
            else:
                delta_k = inner_k
            down_delta = delta_k if down_delta is None else down_delta + delta_k
    assert hidden_TF is not None
    y_TD = block.down(hidden_TF)
    if down is not None:
        assert down_delta is not None
        delta = down_delta if masks_KTE is None else down.outer(down_delta, 0)
        y_TD = y_TD + delta.to(y_TD.dtype)
    if block.down_bias is not None:
        excess_T1 = routing.weights_TK.sum(-1, keepdim=True) - 1
        y_TD = y_TD + (excess_T1 * block.down_bias.float()).to(y_TD.dtype)
    return y_TD if block.output_dropout is None else block.output_dropout(y_TD)


def _cast(x: Tensor, experts: FeedForwardExperts) -> Tensor:
    """To the experts' dtype, as PEFT's LoRA does; autocast overrides it inside the products."""
    for pair in (experts.up, experts.gate, experts.down):
        if pair is not None:
            return x.to(pair[0].dtype)
    return x


def _add_choice(base: Tensor, lora: _Selected | None, inner: Tensor | None, k: int, scaling: float) -> Tensor:
    if lora is None or inner is None:
        return base
    chosen = lora.inner_of_choice(inner, k)
    if lora.masks_KTE is None:
        chosen = chosen * scaling
    return base + lora.outer(chosen, k).to(base.dtype)
