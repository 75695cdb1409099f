"""A mixture of LoRA experts on one linear, in two matrix products.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert, M = E * R.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.ops.factors import Factors
from moelora.ops.recomputed_linear import recomputed_linear
from moelora.ops.sparse_dropout import dropout
from moelora.ops.triton_linear import covers, is_exported, triton_linear


def mixture_linear(
    x_TD: Tensor,
    factors: Factors,
    gates_TE: Tensor | None,
    base_TO: Tensor | None = None,
    separate: bool = False,
    p: float = 0.0,
) -> Tensor:
    """What a mixture adds to its linear: `sum_e g_te * scaling * B_e A_e x_t`.

    A mixture is one LoRA of rank E * R whose inner activation is masked by the gates (`B_cat (g * (A_cat x))`): there
    is no gather, no scatter and no loop; the scaling rides on the gates, and the sum with the base's output on the
    second product. With a shared A the first product is done once, not E times. Accelerators train with a backward pass
    that keeps less: with Triton's kernels where there is Triton and they cover the shape, `triton_linear`, else
    `recomputed_linear`. Equal to `reference.mixture_linear`.

    Args:
        x_TD: Tokens, in the dtype of the experts (or under autocast).
        factors: The experts.
        gates_TE: Weights of the experts, fp32; None for un-routed LoRA (E = 1).
        base_TO: The linear's own output, to be added.
        separate: Whether each expert has products of its own, see `Routing.separate`.
        p: Probability of LoRA dropout on the tokens.

    Returns:
        delta_TO in the dtype of the products; with `base_TO` the sum, in the higher of the two dtypes.
    """
    is_separate = separate and gates_TE is not None and factors.num_experts > 1
    if torch.is_grad_enabled() and not is_separate:
        if covers(x_TD, factors) and not is_exported():
            return triton_linear(x_TD, factors, gates_TE, base_TO, p)
        if x_TD.device.type != "cpu" and not _is_traced():
            return recomputed_linear(x_TD, factors, gates_TE, base_TO, p)
    if p > 0:
        x_TD = dropout(x_TD, p)
    if is_separate and gates_TE is not None:
        return _separately(x_TD, factors, gates_TE, base_TO)
    if gates_TE is None:
        # views of one expert, without the reshapes of several: they cost as much as the products of one token
        inner_TM, weight_MO = F.linear(x_TD, factors.a_ERD[0]), factors.b_EOR[0].t()
        alpha = factors.scaling
    else:
        inner_TER = factors.inner_TER(x_TD)
        inner_TER = inner_TER * (gates_TE * factors.scaling).to(inner_TER.dtype).unsqueeze(-1)
        inner_TM, weight_MO = inner_TER.flatten(-2), factors.weight_MO()
        alpha = 1.0
    if base_TO is not None and base_TO.dtype == inner_TM.dtype:
        return torch.addmm(base_TO, inner_TM, weight_MO, alpha=alpha)
    delta_TO = inner_TM @ weight_MO
    if gates_TE is None:
        delta_TO = delta_TO * alpha
    return delta_TO if base_TO is None else base_TO + delta_TO


def _separately(x_TD: Tensor, factors: Factors, gates_TE: Tensor, base_TO: Tensor | None) -> Tensor:
    """The same, expert by expert. One that no token is sent to adds an exact 0, or on the CPU is left out.

    How a matrix product rounds depends on its shape, so that one product for all experts would round otherwise as soon
    as there is one expert more.
    """
    may_skip = x_TD.device.type == "cpu" and not torch.is_grad_enabled() and not _is_traced()
    sum_TO = base_TO
    for e in range(factors.num_experts):
        if may_skip and not bool(gates_TE[:, e].any()):
            continue
        one = Factors(factors.expanded_a_ERD()[e : e + 1], factors.b_EOR[e : e + 1], factors.scaling)
        sum_TO = mixture_linear(x_TD, one, gates_TE[:, e : e + 1], sum_TO)
    if sum_TO is None:
        return x_TD.new_zeros(len(x_TD), factors.b_EOR.shape[1])
    return sum_TO


def _is_traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
