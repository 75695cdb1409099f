"""A mixture of LoRA experts on one linear, in two matrix products.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def mixture_linear(
    x_TD: Tensor,
    a_ERD: Tensor,
    b_EOR: Tensor,
    gates_TE: Tensor | None,
    scaling: float,
    base_TO: Tensor | None = None,
) -> Tensor:
    """What a mixture adds to its linear: `sum_e g_te * scaling * B_e A_e x_t`.

    A mixture is one LoRA of rank E * R whose inner activation is masked by the gates (`B_cat (g * (A_cat x))`): there
    is no gather, no scatter and no loop; the scaling rides on the gates, and the sum with the base's output on the
    second product. Equal to `reference.mixture_linear`.

    Args:
        x_TD: Tokens, in the dtype of the experts (or under autocast).
        a_ERD, b_EOR: The experts.
        gates_TE: Weights of the experts, fp32; None for un-routed LoRA (E = 1).
        scaling: LoRA's scaling.
        base_TO: The linear's own output, to be added.

    Returns:
        delta_TO in the dtype of the products; with `base_TO` the sum, in the higher of the two dtypes.
    """
    E, R, D = a_ERD.shape
    inner_TM = F.linear(x_TD, a_ERD.view(E * R, D))
    if gates_TE is not None:
        gates_TE = (gates_TE * scaling).to(inner_TM.dtype)
        if R > 1:
            inner_TM = (inner_TM.unflatten(-1, (E, R)) * gates_TE.unsqueeze(-1)).flatten(-2)
        else:
            inner_TM = inner_TM * gates_TE
    # a view, without a copy, for one expert and for experts of rank one
    weight_MO = b_EOR.transpose(1, 2).reshape(E * R, b_EOR.shape[1]) if E > 1 else b_EOR[0].t()
    alpha = scaling if gates_TE is None else 1.0
    if base_TO is not None and base_TO.dtype == inner_TM.dtype:
        return torch.addmm(base_TO, inner_TM, weight_MO, alpha=alpha)
    delta_TO = inner_TM @ weight_MO
    if gates_TE is None:
        delta_TO = delta_TO * scaling
    return delta_TO if base_TO is None else base_TO + delta_TO
