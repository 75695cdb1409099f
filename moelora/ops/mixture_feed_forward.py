"""A mixture of whole feed-forward experts around one frozen block, in one pass over its weights.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, K chosen experts of a
token, N = T * K choices.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.ops.activation_vjp import activation_vjp
from moelora.ops.expert_segments import SegmentPlan, expert_segments
from moelora.ops.fused_kernels import compiler_works
from moelora.ops.fused_segments import fused_segments
from moelora.ops.segments import Segments
from moelora.routing.decision import Routing

Form = Literal["gathered", "segments", "fused", "masked"]

GATHER_AT_MOST = 16
"""Choices up to which each one's own B and A2 are gathered: copying K small matrices beats everything else there."""

KEEP_AT_MOST = 2
"""Choices a token up to which the pre-activations are kept for the backward pass; see `SegmentPlan`."""


@dataclass(frozen=True, eq=False)
class FrozenFeedForward:
    """The frozen parts of a feed-forward block, as functions; `down` includes its bias.

    Attributes:
        kind: "gated": `down(act(gate x) * up x)`; "plain": `down(act(up x))`; "fused": `up` gives gate and up halves.
        up, down: The linears.
        gate: The gate linear of a gated block.
        activation: act.
        down_bias: Bias of `down`, if it has one.
        hidden_dropout: The block's own dropout between activation and `down`, where it is active.
        output_dropout: The block's own dropout behind `down`, where it is active.
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
        dropout: LoRA dropout, applied to the input of each A; None where it is not active.
        weights_sum_to_one: Whether a token's weights always do, so that the bias of `down` needs no correction.
    """

    up: tuple[Tensor, Tensor] | None
    down: tuple[Tensor, Tensor] | None
    gate: tuple[Tensor, Tensor] | None
    scaling: float
    dropout: Callable[[Tensor], Tensor] | None = None
    weights_sum_to_one: bool = False


def choose_form(
    num_tokens: int, routing: Routing, block: FrozenFeedForward, device: torch.device, compiled: bool = False
) -> Form:
    """How to compute a mixture of this shape.

    - "gathered": a handful of choices (decoding): gather each choice's own matrices.
    - "segments": sorted by expert, in tiles that stay in cache, with a backward pass of its own. Training on the CPU.
      Its cost hardly grows with the number of experts.
    - "fused": the same with its element-wise work compiled into single loops, where that is asked for.
    - "masked": the low-rank products of all experts, masked, in plain autograd; no sorting and nothing read back from
      the device, so it is what accelerators and `torch.compile` get, where it fuses. Its cost grows with E * R.
    """
    if torch.compiler.is_compiling() or block.hidden_dropout is not None or routing.ids_TK is None:
        return "masked"
    if num_tokens * routing.num_choices <= GATHER_AT_MOST:
        return "gathered"
    if device.type != "cpu":
        return "masked"
    if compiled and activation_vjp(block.activation).vjp is not None and compiler_works():
        return "fused"
    return "segments"


def mixture_feed_forward(
    x_TD: Tensor,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
    form: Form | None = None,
    compiled: bool = False,
) -> Tensor:
    """`sum_k w_k E_{e_k}(x)`, MixLoRA's mixture (arXiv 2404.15159), with every frozen linear evaluated once.

    `gate` and `up` are shared by all experts (as in the paper), and so is `down`: it is linear, so `sum_k w_k W2 a_k =
    W2 (sum_k w_k a_k)` (the paper says that this cost cannot be reduced). Only the low-rank parts, the activation and
    the products are done per choice. The bias of `down` is scaled by the sum of the weights. Equal to
    `reference.mixture_feed_forward`.

    Args:
        x_TD: Tokens.
        routing: Who computes them.
        block: The frozen block.
        experts: The experts.
        form: How to compute it; chosen by `choose_form` if None.
        compiled: Whether `choose_form` may choose compiled operations.

    Returns:
        y_TD in the dtype that the block's `down` gives.
    """
    form = form or choose_form(x_TD.shape[0], routing, block, x_TD.device, compiled)
    up_TF = block.up(x_TD)
    gate_TF = block.gate(x_TD) if block.gate is not None else None
    pairs = _in_compute_dtype(experts, up_TF)
    x_lora = x_TD if experts.dropout is None else experts.dropout(x_TD)
    if form == "gathered":
        hidden_TF, delta_TD = _gathered(x_lora, up_TF, gate_TF, pairs, routing, block, experts)
        y_TD = block.down(hidden_TF)
        if delta_TD is not None:
            y_TD = y_TD + delta_TD.to(y_TD.dtype)
    else:
        forms: dict[Form, Callable[..., tuple[Tensor, Tensor | None]]] = {
            "segments": partial(_segments, expert_segments),
            "fused": partial(_segments, fused_segments),
            "masked": _masked,
        }
        up_inner, gate_inner = _inner(x_lora, pairs["up"]), _inner(x_lora, pairs["gate"])
        hidden_TF, inner_TER = forms[form](up_TF, gate_TF, up_inner, gate_inner, pairs, routing, block, experts)
        y_TD = block.down(hidden_TF)
        if pairs["down"] is not None and inner_TER is not None:
            y_TD = _add_down(y_TD, inner_TER, pairs["down"][1])
    if block.down_bias is not None and not experts.weights_sum_to_one:
        excess_T1 = routing.weights_TK.sum(-1, keepdim=True) - 1
        y_TD = y_TD + (excess_T1 * block.down_bias.float()).to(y_TD.dtype)
    return y_TD if block.output_dropout is None else block.output_dropout(y_TD)


Pair = tuple[Tensor, Tensor]


def _in_compute_dtype(experts: FeedForwardExperts, up_TF: Tensor) -> dict[str, Pair | None]:
    """The experts in the dtype to compute in: their own, as PEFT's LoRA does, or autocast's, as it would."""
    pairs = {"up": experts.up, "gate": experts.gate, "down": experts.down}
    device = up_TF.device.type
    if not torch.is_autocast_enabled(device):
        return pairs
    dtype = torch.get_autocast_dtype(device)
    return {role: None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)) for role, pair in pairs.items()}


def _inner(x_TD: Tensor, pair: Pair | None) -> Tensor | None:
    """`A_e x` of all experts: [T, E, R]."""
    if pair is None:
        return None
    E, R, D = pair[0].shape
    return F.linear(x_TD.to(pair[0].dtype), pair[0].view(E * R, D)).unflatten(-1, (E, R))


def _add_down(y_TD: Tensor, inner_TER: Tensor, b_EDR: Tensor) -> Tensor:
    """`y + sum_e B_e inner_e` in one product."""
    E, D, R = b_EDR.shape
    inner_TM, weight_MD = inner_TER.flatten(1), b_EDR.transpose(1, 2).reshape(E * R, D)
    if y_TD.dtype == inner_TM.dtype == weight_MD.dtype:
        return torch.addmm(y_TD, inner_TM, weight_MD)
    return y_TD + (inner_TM @ weight_MD).to(y_TD.dtype)


def _segments(
    compute: Callable[..., tuple[Tensor, Tensor | None]],
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner: Tensor | None,
    gate_inner: Tensor | None,
    pairs: dict[str, Pair | None],
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    assert routing.ids_TK is not None
    T = len(routing.ids_TK)
    width = up_TF.shape[1] // 2 if block.kind == "fused" else up_TF.shape[1]
    keep = None
    if experts.dropout is not None and pairs["down"] is not None:
        keep = experts.dropout(torch.ones(T, width, dtype=up_TF.dtype))
    plan = SegmentPlan(
        Segments.of(routing.ids_TK, routing.num_experts),
        T,
        width,
        block.kind,
        activation_vjp(block.activation),
        experts.scaling,
        routing.num_choices <= KEEP_AT_MOST,
        keep,
    )
    up, gate, down = pairs["up"], pairs["gate"], pairs["down"]
    with torch.autocast(up_TF.device.type, enabled=False):
        return compute(
            up_TF,
            gate_TF,
            up_inner,
            gate_inner,
            up[1] if up is not None else None,
            gate[1] if gate is not None else None,
            down[0] if down is not None else None,
            routing.weights_TK,
            plan,
        )


def _activate(up: Tensor, gate: Tensor | None, block: FrozenFeedForward) -> Tensor:
    if block.kind == "fused":
        gate, up = up.chunk(2, dim=-1)
    return block.activation(up) if gate is None else block.activation(gate) * up


def _gathered(
    x_lora: Tensor,
    up_TF: Tensor,
    gate_TF: Tensor | None,
    pairs: dict[str, Pair | None],
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    """The input of the frozen down product, and what the experts add behind it: few operations, for few choices."""
    assert routing.ids_TK is not None
    T, K = routing.ids_TK.shape
    ids_N = routing.ids_TK.reshape(-1)

    def of_choices(rows: Tensor) -> Tensor:
        return rows.unsqueeze(1).expand(-1, K, -1).reshape(T * K, 1, -1)

    # sums of products rather than batched products where they are faster: a matrix product has a cost a call
    def pre(base_TF: Tensor, pair: Pair | None) -> Tensor:
        base_N1F = of_choices(base_TF)
        if pair is None:
            return base_N1F
        a_NRD, b_NRF = pair[0].index_select(0, ids_N), pair[1].index_select(0, ids_N).transpose(1, 2)
        inner_N1R = (a_NRD * of_choices(x_lora.to(a_NRD.dtype))).sum(-1).unsqueeze(1)
        if base_N1F.dtype == b_NRF.dtype:
            return torch.baddbmm(base_N1F, inner_N1R, b_NRF, alpha=experts.scaling)
        return base_N1F + (torch.bmm(inner_N1R, b_NRF) * experts.scaling).to(base_N1F.dtype)

    up_N1F = pre(up_TF, pairs["up"])
    gate_N1F = None if gate_TF is None else pre(gate_TF, pairs["gate"])
    act_N1F = _activate(up_N1F, gate_N1F, block)
    weights_TK1 = routing.weights_TK.unsqueeze(-1)
    hidden_TF = (act_N1F.view(T, K, -1) * weights_TK1.to(act_N1F.dtype)).sum(1)
    down = pairs["down"]
    if down is None:
        return hidden_TF, None
    dropped_N1F = act_N1F if experts.dropout is None else experts.dropout(act_N1F)
    a_NRF, b_NDR = down[0].index_select(0, ids_N), down[1].index_select(0, ids_N)
    inner_NR = (a_NRF * dropped_N1F.to(a_NRF.dtype)).sum(-1)
    inner_NR = inner_NR * (weights_TK1.view(-1, 1) * experts.scaling).to(inner_NR.dtype)
    return hidden_TF, torch.bmm(b_NDR, inner_NR.unsqueeze(-1)).view(T, K, -1).sum(1)


def _masked(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner: Tensor | None,
    gate_inner: Tensor | None,
    pairs: dict[str, Pair | None],
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
) -> tuple[Tensor, Tensor | None]:
    masks_KTE = None
    if routing.ids_TK is not None:
        masks_KTE = F.one_hot(routing.ids_TK.t(), routing.num_experts) * experts.scaling

    def pre(base_TF: Tensor, inner_TER: Tensor | None, pair: Pair | None, k: int) -> Tensor:
        if inner_TER is None or pair is None:
            return base_TF
        if masks_KTE is None:
            delta = F.linear(inner_TER[:, k] * experts.scaling, pair[1][k])
        else:
            E, out, R = pair[1].shape
            masked_TM = (inner_TER * masks_KTE[k].to(inner_TER.dtype).unsqueeze(-1)).flatten(1)
            delta = masked_TM @ pair[1].transpose(1, 2).reshape(E * R, out)
        return base_TF + delta.to(base_TF.dtype)

    hidden_TF: Tensor | None = None
    inners: list[Tensor] = []
    down = pairs["down"]
    for k in range(routing.num_choices):
        weight_T1 = routing.weights_TK[:, k : k + 1]
        up_k = pre(up_TF, up_inner, pairs["up"], k)
        gate_k = None if gate_TF is None else pre(gate_TF, gate_inner, pairs["gate"], k)
        act_k = _activate(up_k, gate_k, block)
        if block.hidden_dropout is not None:
            act_k = block.hidden_dropout(act_k)
        weighted = act_k * weight_T1.to(act_k.dtype)
        hidden_TF = weighted if hidden_TF is None else hidden_TF + weighted
        if down is None:
            continue
        dropped = (act_k if experts.dropout is None else experts.dropout(act_k)).to(down[0].dtype)
        if masks_KTE is None:
            inners.append(F.linear(dropped, down[0][k]) * (weight_T1 * experts.scaling).to(dropped.dtype))
        else:
            E, R, width = down[0].shape
            inner_TER = F.linear(dropped, down[0].view(E * R, width)).unflatten(-1, (E, R))
            inners.append(inner_TER * (masks_KTE[k] * weight_T1).to(inner_TER.dtype).unsqueeze(-1))
    assert hidden_TF is not None
    if not inners:
        return hidden_TF, None
    return hidden_TF, torch.stack(inners, 1) if masks_KTE is None else torch.stack(inners).sum(0)
