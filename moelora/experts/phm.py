"""Adapters of hypercomplex linears behind a feed-forward block (MixPHM).

Shape suffixes: E experts, T tokens, N the number of summands of a matrix, R their rank, D features of the block, M
inner features of the adapter.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, is_count, is_real, is_share


@register
@dataclass(frozen=True, kw_only=True)
class PhmExperts(Experts):
    """`y + scale * Up_e(gelu(Down(y)))` behind a feed-forward block with the output y (MixPHM, arXiv 2303.01239).

    Down is shared, Up is an expert's own. Their matrices are `sum_i P_i (x) (U_i V_i)`, (x) the Kronecker product, P_i
    [N, N], U_i V_i of rank R. Experts are mixed by the mean of their matrices, which is the mean of their outputs. V of
    Up starts at 0.

    Args:
        num_experts: Number of experts E.
        reduction: D / M; M is rounded to a multiple of N.
        summands: N; it divides D.
        rank: R.
        scale: See above.
        lora_dropout: Probability of dropping an element of y before Down, in training.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "phm"

    num_experts: int = 4
    reduction: int = 12
    summands: int = 4
    rank: int = 8
    scale: float = 1.0
    lora_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("num_experts", "reduction", "summands", "rank"):
            check(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 1")
        check(is_real(self.scale), "scale", self.scale, "a finite number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")

    @property
    def scaling(self) -> float:
        """`scale`."""
        return self.scale

    def check(self, config: Any) -> None:
        """Refuse scores of each token: the experts' matrices are mixed before they meet one.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.scores.kind == "constant" and config.selection.kind in ("draw", "dense"),
            "scores",
            config.scores.describe(),
            "'constant', with the selection 'draw' or 'dense', with 'phm' experts",
            "Their matrices are mixed before they meet a token.",
        )
        of_block = config.placement.kind == "parts" and config.placement.parts == ["down"]
        check(
            of_block,
            "placement",
            config.placement.describe(),
            "{'kind': 'parts', 'parts': ['down']} with 'phm' experts",
        )

    def check_site(self, site: Site) -> None:
        """See `Choice.check_site`."""
        features = site.linears[""][1]
        if features % self.summands:
            raise ConfigError(
                f"summands is {self.summands}, and {site.name!r} has {features} features; allowed: a number that "
                "divides them."
            )

    def router_features(self, site: Site) -> int:
        """Those of the block."""
        return site.linears[""][1]

    def _inner(self, features: int) -> int:
        return self.summands * max(1, round(features / self.reduction / self.summands))

    def params(self, site: Site) -> list[Param]:
        """P, U and V of "down" and of "up" [E, ...], and what is added, `S`."""
        E, N, R, D = site.num_experts, self.summands, self.rank, site.linears[""][1]
        M = self._inner(D)
        rule, zeros = Init("normal", 0.5), Init("zeros")
        return [
            Param("P.down", (N, N, N), rule),
            Param("U.down", (N, D // N, R), Init("normal", (D // N) ** -0.5 if N <= D else 1.0)),
            Param("V.down", (N, R, M // N), Init("normal", R**-0.5)),
            Param("S.down", (M,), zeros),
            Param("P.up", (E, N, N, N), rule),
            Param("U.up", (E, N, M // N, R), Init("normal", (M // N) ** -0.5)),
            Param("V.up", (E, N, R, D // N), zeros),
            Param("S.up", (E, D), zeros),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        y = given.base(given.x)
        p, u, v, s = (given.tensor(f"{name}.down") for name in "PUVS")
        h = given.dropout(y.to(p.dtype))
        z = F.gelu(h @ phm_matrix(p, u, v) + s)
        # the same for all tokens; an expert that was not drawn has a gradient of 0
        weights_E = given.route(y).gates_TE()[0].to(p.dtype)
        p, u, v, s = (given.tensor(f"{name}.up") for name in "PUVS")
        up_MD = torch.einsum("e,emd->md", weights_E, phm_matrix(p, u, v))
        return (y + given.scaling * (z @ up_MD + weights_E @ s)).to(y.dtype)


def phm_matrix(p: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """`sum_i P_i (x) (U_i V_i)`.

    Args:
        p: [..., N, N, N].
        u: [..., N, D / N, R].
        v: [..., N, R, M / N].

    Returns:
        [..., D, M].
    """
    blocks = torch.einsum("...iab,...icd->...acbd", p, u @ v)
    *rest, a, c, b, d = blocks.shape
    return blocks.reshape(*rest, a * c, b * d)
