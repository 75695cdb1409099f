"""A mixture of whole feed-forward experts around one frozen block, in one pass over its weights.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from moelora.autocast import no_autocast
from moelora.ops.activation_vjp import activation_vjp
from moelora.ops.compiled_kernels import CompiledKernels, compiler_works
from moelora.ops.expert_segments import SegmentPlan, expert_segments
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.gathered_experts import gathered_experts
from moelora.ops.grouped_experts import grouped_experts
from moelora.ops.masked_experts import masked_experts
from moelora.ops.segment_kernels import EagerKernels
from moelora.ops.segments import Segments
from moelora.ops.triton_feed_forward import covers, triton_feed_forward
from moelora.ops.triton_linear import is_exported
from moelora.routing.decision import Routing

Form = Literal["gathered", "segments", "compiled", "triton", "grouped", "masked"]

GATHER_AT_MOST = 16
"""Choices up to which each one's own B and A2 are gathered: copying K small matrices beats everything else there."""

KEEP_AT_MOST = 2
"""Choices a token up to which the pre-activations are kept for the backward pass; see `SegmentPlan`."""


def choose_form(
    x_TD: Tensor,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
    compiled: bool = False,
) -> Form:
    """How to compute a mixture of this shape; the experts are in their compute dtype.

    - "gathered": a handful of choices (decoding): gather each choice's own matrices.
    - "segments": sorted by expert, in tiles that stay in cache, with a backward pass of its own. Training on the CPU.
      Its cost hardly grows with the number of experts.
    - "compiled": the same with its element-wise work compiled into single loops, where that is asked for.
    - "triton": Triton's kernels, one launch between the frozen products. CUDA, where there is Triton and it covers the
      shape (few ranks in all: its cost grows with K * E * R).
    - "grouped": grouped by expert in batches of one size, with a backward pass of its own that keeps nothing of an
      expert; nothing is read back from the device. Accelerators otherwise.
    - "masked": the low-rank products of all experts, masked, in plain autograd: for `torch.compile`, `torch.export` and
      `torch.jit.trace`, whose graph must not depend on the routing of one batch, and for a block with a dropout of its
      own. Its cost grows with E * R.
    """
    if is_exported():
        return "masked"
    num_tokens = x_TD.shape[0]
    if block.hidden_dropout is not None or num_tokens == 0:
        return "masked"
    is_few = routing.ids_TK is not None and num_tokens * routing.num_choices <= GATHER_AT_MOST
    if not is_few and covers(x_TD, block, experts):
        return "triton"
    if torch.compiler.is_compiling():
        return "masked"
    if is_few:
        return "gathered"
    if x_TD.device.type != "cpu":
        return "grouped"
    if routing.ids_TK is None:
        return "masked"
    if compiled and activation_vjp(block.activation).vjp is not None and compiler_works():
        return "compiled"
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

    With B = 0 and weights of sum one it is the frozen block, in half precision bit for bit. There "compiled" may
    differ by one rounding (see `compiled_kernels`), and so may "triton", whose exponential is not torch's to the last
    bit.

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
    up_TF = block.up(x_TD)
    gate_TF = block.gate(x_TD) if block.gate is not None else None
    experts = experts.in_compute_dtype(up_TF.device)
    form = form or choose_form(x_TD, routing, block, experts, compiled)
    x_lora = x_TD if experts.dropout is None or form == "grouped" else experts.dropout(x_TD)
    if form in ("gathered", "grouped"):
        operation = gathered_experts if form == "gathered" else grouped_experts
        hidden_TF, delta_TD = operation(x_lora, up_TF, gate_TF, routing, block, experts)
        y_TD = block.down(hidden_TF)
        if delta_TD is not None:
            y_TD = y_TD + delta_TD.to(y_TD.dtype)
    else:
        up_inner, gate_inner = _inner(x_lora, experts.up), _inner(x_lora, experts.gate)
        if form in ("masked", "triton"):
            between = masked_experts if form == "masked" else triton_feed_forward
            hidden_TF, inner_TER = between(up_TF, gate_TF, up_inner, gate_inner, routing, block, experts)
        else:
            hidden_TF, inner_TER = _segments(
                up_TF, gate_TF, up_inner, gate_inner, routing, block, experts, form == "compiled"
            )
        y_TD = block.down(hidden_TF)
        if experts.down is not None and inner_TER is not None:
            y_TD = _add_down(y_TD, inner_TER, experts.down)
    if block.down_bias is not None and not routing.sums_to_one:
        excess_T1 = routing.weights_TK.sum(-1, keepdim=True) - 1
        y_TD = y_TD + (excess_T1 * block.down_bias.float()).to(y_TD.dtype)
    return y_TD if block.output_dropout is None else block.output_dropout(y_TD)


def _inner(x_TD: Tensor, factors: Factors | None) -> Tensor | None:
    return None if factors is None else factors.inner_TER(x_TD.to(factors.a_ERD.dtype))


def _add_down(y_TD: Tensor, inner_TER: Tensor, factors: Factors) -> Tensor:
    """`y + sum_e B_e inner_e` in one product; the inner activations are scaled."""
    inner_TM, weight_MD = inner_TER.flatten(1), factors.weight_MO()
    if y_TD.dtype == inner_TM.dtype == weight_MD.dtype:
        return torch.addmm(y_TD, inner_TM, weight_MD)
    return y_TD + (inner_TM @ weight_MD).to(y_TD.dtype)


def _segments(
    up_TF: Tensor,
    gate_TF: Tensor | None,
    up_inner_TER: Tensor | None,
    gate_inner_TER: Tensor | None,
    routing: Routing,
    block: FrozenFeedForward,
    experts: FeedForwardExperts,
    compiled: bool,
) -> tuple[Tensor, Tensor | None]:
    """The sorted form: `expert_segments` of a gated or plain block; a fused linear comes apart into its halves."""
    assert routing.ids_TK is not None
    up, gate, down = experts.up, experts.gate, experts.down
    up_b_EFR = None if up is None else up.b_EOR
    gate_b_EFR = None if gate is None else gate.b_EOR
    if block.kind == "fused":
        gate, gate_inner_TER = up, up_inner_TER
        gate_TF, up_TF = up_TF.chunk(2, dim=-1)
        gate_b_EFR, up_b_EFR = (None, None) if up_b_EFR is None else up_b_EFR.chunk(2, dim=1)
    keep_TF = None
    if experts.dropout is not None and down is not None:
        keep_TF = experts.dropout(up_TF.new_ones(up_TF.shape))
    num_experts = routing.num_experts
    up_inner_TER, gate_inner_TER = (
        None if inner_TER is None else inner_TER.expand(-1, num_experts, -1)
        for inner_TER in (up_inner_TER, gate_inner_TER)
    )
    kernels = CompiledKernels if compiled else EagerKernels
    plan = SegmentPlan(
        activation_vjp(block.activation),
        1.0 if up is None else up.scaling,
        1.0 if gate is None else gate.scaling,
        1.0 if down is None else down.scaling,
        kernels,
        compiled or routing.num_choices <= KEEP_AT_MOST,
    )
    with no_autocast(up_TF.device):
        return expert_segments(
            up_TF,
            gate_TF,
            up_inner_TER,
            gate_inner_TER,
            up_b_EFR,
            gate_b_EFR,
            None if down is None else down.expanded_a_ERD(),
            routing.weights_TK,
            keep_TF,
            Segments.of(routing.ids_TK, num_experts, kernels.max_rows),
            plan,
        )
