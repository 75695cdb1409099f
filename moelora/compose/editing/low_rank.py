"""Sums of low-rank products, cut to a rank.

Shape suffixes: M inner rank of a sum of products, R rank to keep, D input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The best approximation of a product by one of a smaller rank (Eckart-Young).

    Attributes:
        a_RD, b_OR: Its factors; each has the square root of the singular values.
        squared_norm: That of the whole product.
        squared_kept: What of it is kept.
    """

    a_RD: Tensor
    b_OR: Tensor
    squared_norm: float
    squared_kept: float

    @property
    def kept(self) -> float:
        """The share of the squared Frobenius norm that it keeps, 1 if the product is 0."""
        return self.squared_kept / self.squared_norm if self.squared_norm > 0 else 1.0


def cut(a_MD: Tensor, b_OM: Tensor, rank: int) -> LowRank:
    """`B A` as a product of rank `rank`, without ever making the matrix [O, D].

    QR of both factors leaves an M x M matrix to decompose. In float64: singular values of a trained LoRA span orders.

    Args:
        a_MD, b_OM: The factors.
        rank: The rank to keep; more than there is fills up with zeros.
    """
    q_b_OM, r_b_MM = torch.linalg.qr(b_OM.double())
    q_a_DM, r_a_MM = torch.linalg.qr(a_MD.double().t())
    u, s, vh = torch.linalg.svd(r_b_MM @ r_a_MM.t(), full_matrices=False)
    # what is left of a direction that the product does not have is rounding of its factors
    noise = s[:1] * torch.finfo(torch.float32).eps * max(a_MD.shape[1], b_OM.shape[0])
    s = torch.where(s > noise, s, 0)
    found = min(rank, len(s))
    root = s[:found].sqrt()
    a_RD, b_OR = a_MD.new_zeros(rank, a_MD.shape[1]), b_OM.new_zeros(b_OM.shape[0], rank)
    a_RD[:found] = (root.unsqueeze(1) * (vh[:found] @ q_a_DM.t())).to(a_RD.dtype)
    b_OR[:, :found] = ((q_b_OM @ u[:, :found]) * root).to(b_OR.dtype)
    return LowRank(a_RD, b_OR, float(s.square().sum()), float(s[:found].square().sum()))


def weighted_sum(a_ERD: Tensor, b_EOR: Tensor, weights_E: Tensor) -> tuple[Tensor, Tensor]:
    """`sum_e w_e B_e A_e` as factors A [E * R, D] and B [O, E * R]."""
    b_EOR = b_EOR * weights_E.to(b_EOR).view(-1, 1, 1)
    return a_ERD.flatten(0, 1), b_EOR.permute(1, 0, 2).flatten(1)
