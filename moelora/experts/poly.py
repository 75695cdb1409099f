"""LoRAs that are mixed in weight space: A and B each by themselves (Polytropon, MHR).

Shape suffixes: T tokens, Q splits, S skills, E = Q * S, R rank, D input features, O output features, M = E * R, X and Z
anything.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.errors import TargetError
from moelora.experts.base import ExpertInput, Experts
from moelora.tensors import AdapterTensors
from moelora.validation import check, is_count


@register
@dataclass(frozen=True, kw_only=True)
class PolyExperts(Experts):
    """Skills whose factors are averaged before they are multiplied (Polytropon, arXiv 2202.13914; MHR, 2211.03831).

        A = concat_q sum_s w_qs A_qs,   B = concat_q sum_s w_qs B_qs,   y = W x + B A x / r

    A_qs [R, D / Q] and B_qs [O / Q, R]: with Q splits each slice of the input and of the output mixes for itself. That
    is no sum of LoRAs: products of one skill's B with another's A belong to it. With fixed weights it is one LoRA.

    Args:
        num_experts: E = Q * S, the number of slices of A and of B.
        r: Rank.
        num_splits: Q.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "poly"

    num_experts: int = 4
    r: int = 8
    num_splits: int = 1

    def __post_init__(self) -> None:
        E, Q = self.num_experts, self.num_splits
        check(is_count(self.r), "r", self.r, "an integer of at least 1")
        check(is_count(Q), "num_splits", Q, "an integer of at least 1")
        check(is_count(E) and E % Q == 0, "num_experts", E, f"a multiple of num_splits ({Q})")

    def check(self, config: Any) -> None:
        """Refuse placements and scores that do not give each split its weights.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.placement.kind == "linear" and config.placement.unrouted_modules is None,
            "placement",
            config.placement.describe(),
            "'linear' without unrouted_modules, with 'poly' experts",
            "The factors of one linear are mixed.",
        )
        groups = getattr(config.scores, "groups", 1)
        check(groups == self.num_splits, "scores.groups", groups, f"num_splits ({self.num_splits}) of the experts")

    @property
    def scaling(self) -> float:
        """1 / r; there is no alpha."""
        return 1 / self.r

    def params(self, site: Site) -> list[Param]:
        """`A.weight` [E, R, D / Q], kaiming, and `B.weight` [E, O / Q, R], 0.

        Raises:
            TargetError: If the splits do not divide the features.
        """
        (sizes,), Q = site.linears.values(), self.num_splits
        if sizes[0] % Q or sizes[1] % Q:
            raise TargetError(
                f"{site.name!r} has {sizes[0]} inputs and {sizes[1]} outputs, which num_splits={Q} does not divide; "
                "allowed: a common divisor. Lower num_splits, or leave the linear out with exclude_modules."
            )
        E = site.num_experts
        return [
            Param("A.weight", (E, self.r, sizes[0] // Q), Init("kaiming")),
            Param("B.weight", (E, sizes[1] // Q, self.r), Init("zeros")),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`.

        Each split's slices are blocks on the diagonal of one A [ER, D] and one B [O, ER]: two plain products, which are
        faster than products of strided slices, though Q times as many FLOPs. No token's own A or B is made: the weights
        go to the inner activations.
        """
        a_QSRD, b_QSOR = (given.tensor(name).unflatten(0, (self.num_splits, -1)) for name in ("A.weight", "B.weight"))
        y = given.base(given.x)
        a_MD, b_OM = _block_diagonal(a_QSRD.flatten(1, 2)), _block_diagonal(b_QSOR.transpose(1, 2).flatten(2))
        inner_TER = F.linear(given.x.to(a_MD.dtype), a_MD).reshape(-1, self.num_experts, self.r)
        gates_TE1 = given.route(given.x).gates_TE().to(inner_TER.dtype).unsqueeze(-1)
        inner_T1R = (inner_TER * gates_TE1).sum(1, keepdim=True)
        delta_TO = F.linear((inner_T1R * (gates_TE1 * given.scaling)).flatten(1), b_OM)
        return (y + delta_TO.view(y.shape)).to(y.dtype)

    def lora_at(self, parts: Mapping[str, AdapterTensors], gates_E: Tensor) -> tuple[Tensor, Tensor]:
        """A [R, D] and B [O, R] of the LoRA that fixed weights make.

        Args:
            parts: See `Experts.factors`.
            gates_E: The weights.
        """
        a_QSRD, b_QSOR = (parts[first].tensor("weight").unflatten(0, (self.num_splits, -1)) for first in ("A", "B"))
        gates_QS = gates_E.to(a_QSRD.dtype).unflatten(0, (self.num_splits, -1))
        a_RD = torch.einsum("qs,qsrd->rqd", gates_QS, a_QSRD).flatten(1)
        return a_RD, torch.einsum("qs,qsor->qor", gates_QS, b_QSOR).flatten(0, 1)


def _block_diagonal(blocks_QXZ: Tensor) -> Tensor:
    """The blocks on the diagonal of one matrix [Q * X, Q * Z]; a view of a single one."""
    Q = len(blocks_QXZ)
    if Q == 1:
        return blocks_QXZ[0]
    eye_QQ = torch.eye(Q, dtype=blocks_QXZ.dtype, device=blocks_QXZ.device)
    return (blocks_QXZ.unsqueeze(2) * eye_QQ[:, None, :, None]).flatten(0, 1).flatten(1)
