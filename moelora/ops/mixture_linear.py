"""A mixture of LoRA experts on one linear, in two matrix products.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mixture_linear(x_TD: Tensor, a_ERD: Tensor, b_EOR: Tensor, gates_TE: Tensor | None, scaling: float) -> Tensor:
    """What a mixture adds to its linear: `sum_e g_te * scaling * B_e A_e x_t`.

    A mixture is one LoRA of rank E * R whose inner activation is masked by the gates (identity I1: `B_cat (g * (A_cat
    x))`), so there is no gather, no scatter and no loop, and the scaling rides on the gates for free. Equal to
    `reference.mixture_linear`.

    Args:
        x_TD: Tokens, in the dtype of the experts (or under autocast). Any leading shape if `gates_TE` is None.
        a_ERD, b_EOR: The experts.
        gates_TE: Weights of the experts, fp32; None for un-routed LoRA (E = 1).
        scaling: LoRA's scaling.

    Returns:
        delta_TO in the dtype of the products.
    """
    E, R, D = a_ERD.shape
    if E == 1:
        inner = F.linear(x_TD, a_ERD[0])
        weight_OM = b_EOR[0]
    else:
        inner = F.linear(x_TD, a_ERD.view(E * R, D))
        weight_OM = b_EOR.transpose(0, 1).reshape(b_EOR.shape[1], E * R)
    if gates_TE is None:
        return F.linear(inner * scaling, weight_OM)
    gates_TE = (gates_TE * scaling).to(inner.dtype)
    if R > 1:
        inner = (inner.unflatten(-1, (E, R)) * gates_TE.unsqueeze(-1)).flatten(-2)
    else:
        inner = inner * gates_TE
    return F.linear(inner, weight_OM)
