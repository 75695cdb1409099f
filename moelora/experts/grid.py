"""Experts that are all pairs of a row of A and a column of B (MoR1E).

Shape suffixes: T tokens, I rows of A, J columns of B, E = I * J pairs, D input features, O output features.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, check_bool, is_count, is_share


@register
@dataclass(frozen=True, kw_only=True)
class GridExperts(Experts):
    """Rank-1 experts, one for each pair of a row a_i of A and a column b_j of B (MoR1E, arXiv 2404.08985).

        delta = sg * sum_ij R_ij b_j (a_i . x) = sg * B (R^T (A x)),   sg = sigmoid(100 w), w = 0 at first

    with R the router's weights. `diagonal` pairs a_i with b_i alone: rank-1 experts as in SMoRA.

    Args:
        num_experts: E: `rows * columns`, of a diagonal `rows`.
        rows: I, rows of A.
        columns: J, columns of B; of a diagonal the same number.
        diagonal: Whether only a_i and b_i are paired.
        lora_dropout: As of `LoraExperts`.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "grid"

    num_experts: int = 32
    rows: int = 4
    columns: int = 8
    diagonal: bool = False
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        check(is_count(self.rows), "rows", self.rows, "an integer of at least 1")
        check(is_count(self.columns), "columns", self.columns, "an integer of at least 1")
        check_bool("diagonal", self.diagonal)
        fits = not self.diagonal or self.rows == self.columns
        check(fits, "columns", self.columns, f"the number of rows ({self.rows}) with diagonal=True")
        E = self.rows if self.diagonal else self.rows * self.columns
        check(self.num_experts == E, "experts.num_experts", self.num_experts, f"the number of pairs, {E}")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")

    def check(self, config: Any) -> None:
        """Refuse anything but a router at each linear.

        Raises:
            ConfigError: With the reason.
        """
        self.check_router_at_each_linear(config, "Without a router there is no weight for the pairs.")

    def params(self, site: Site) -> list[Param]:
        """`A.weight` [I, D] and `B.weight` [O, J] as in a LoRA, and `gate.weight` [1]."""
        in_features, out_features = site.linears[""]
        return [
            Param("A.weight", (self.rows, in_features), Init("kaiming")),
            Param("B.weight", (out_features, self.columns), Init("zeros")),
            Param("gate.weight", (1,), Init("zeros"), dtype=torch.float32),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        a_ID, b_OJ = given.tensor("A.weight"), given.tensor("B.weight")
        gates_TE = given.route(given.x).gates_TE()
        inner_TI = F.linear(given.dropout(given.x.to(a_ID.dtype)), a_ID).flatten(0, -2)
        scale = given.scaling * torch.sigmoid(100 * given.tensor("gate.weight").float())
        weights = (gates_TE * scale).to(inner_TI.dtype)
        if self.diagonal:
            middle_TJ = inner_TI * weights
        else:
            middle_TJ = (inner_TI.unsqueeze(1) @ weights.view(-1, self.rows, self.columns)).squeeze(1)
        y = given.base(given.x)
        return (y + F.linear(middle_TJ, b_OJ).view(y.shape)).to(y.dtype)
