"""The stacked low-rank factors of a mixture's experts on one linear.

Shape suffixes: T tokens, D input features, O output features, E experts, R rank of one expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True, eq=False)
class Factors:
    """What the experts add to one linear: `scaling * B_e A_e x`. Operations take these and know no method.

    Attributes:
        a_ERD: A of each expert, or [1, R, D] where all experts share one A (HydraLoRA).
        b_EOR: B of each expert.
        scaling: LoRA's scaling.
        num_shared: How many of the experts, the first ones, are always on, with weight 1.
    """

    a_ERD: Tensor
    b_EOR: Tensor
    scaling: float
    num_shared: int = 0

    @property
    def num_experts(self) -> int:
        """E."""
        return self.b_EOR.shape[0]

    def all_gates(self, gates_TE: Tensor) -> Tensor:
        """The weights of all experts: 1 for those that are always on, and those of the rest as they are given."""
        if not self.num_shared:
            return gates_TE
        return torch.cat([gates_TE.new_ones(len(gates_TE), self.num_shared), gates_TE], -1)

    def to(self, dtype: torch.dtype) -> Factors:
        """The same in another dtype."""
        return replace(self, a_ERD=self.a_ERD.to(dtype), b_EOR=self.b_EOR.to(dtype))

    def inner_TER(self, x_TD: Tensor) -> Tensor:
        """`A_e x` of all experts in one product: [T, E, R], or [T, 1, R] with a shared A."""
        E, R, _ = self.a_ERD.shape
        return F.linear(x_TD, self.a_ERD.flatten(0, 1)).view(*x_TD.shape[:-1], E, R)

    def weight_MO(self) -> Tensor:
        """B of all experts as one matrix behind `inner`: [E * R, O]; a view for one expert and for rank one."""
        return self.b_EOR.transpose(1, 2).flatten(0, 1)

    def expanded_a_ERD(self) -> Tensor:
        """A as if each expert had its own; a view."""
        return self.a_ERD.expand(self.num_experts, -1, -1)
