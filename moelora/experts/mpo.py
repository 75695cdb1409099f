"""LoRAs whose matrices are matrix product operators with a central tensor that all experts share (MPOE).

Shape suffixes: E experts, R rank of one expert, n features split as I * J * K, A and B the bonds between the three
tensors of a matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import Experts
from moelora.ops.factors import Factors
from moelora.tensors import AdapterTensors
from moelora.validation import check, check_bool, is_count, is_positive, is_share


@register
@dataclass(frozen=True, kw_only=True)
class MpoExperts(Experts):
    """An expert is a LoRA, and both its matrices are products of three tensors, the central one shared (MPOE).

        A_e[r, (i, j, k)] = sum_ab L_e[a, i] C[a, r, j, b] Q_e[b, k]

    for n = I J K input features, and the same of B_e for the output features; after arXiv 2203.01104, where the
    matrices are those of whole feed-forward experts. The central tensor C has R n elements, as many as a LoRA's matrix;
    what an expert has of its own, L_e [I, I] and Q_e [K, K], is small. I and K are the largest divisors of n, and of
    n / I, up to `ends`. C starts U(-1/sqrt(n), 1/sqrt(n)), L N(0, 1/sqrt(I)), Q N(0, 1/sqrt(K)), but Q of B at 0.

    All tokens move C, and an expert's tokens its own tensors. So in training each element of C has a gradient in a
    forward with the probability 1 - `gradient_mask` only: the gradient mask of the paper.

    Args:
        num_experts: Number of experts E.
        r: Rank R of one expert.
        lora_alpha, lora_dropout, use_rslora: As of `LoraExperts`.
        ends: See above.
        gradient_mask: See above; 0 is none.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "mpo"
    is_low_rank: ClassVar[bool] = True
    has_reference: ClassVar[bool] = True

    num_experts: int = 8
    r: int = 16
    lora_alpha: float = 32
    lora_dropout: float = 0.0
    use_rslora: bool = False
    ends: int = 8
    gradient_mask: float = 0.75

    def __post_init__(self) -> None:
        for name in ("num_experts", "r", "ends"):
            check(is_count(getattr(self, name)), name, getattr(self, name), "an integer of at least 1")
        check(is_positive(self.lora_alpha), "lora_alpha", self.lora_alpha, "a positive number")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check_bool("use_rslora", self.use_rslora)
        check(is_share(self.gradient_mask), "gradient_mask", self.gradient_mask, "0 <= gradient_mask < 1")

    @property
    def scaling(self) -> float:
        """The factor of `B A x`."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    def params(self, site: Site) -> list[Param]:
        """Of A and of B of each linear L [E, I, I], C [I, R, J, K] and Q [E, K, K]."""
        E, params = site.num_experts, []
        for role, sizes in site.linears.items():
            for factor, n in zip("AB", sizes, strict=True):
                first, middle, last = split(n, self.ends)
                name, q_init = role or "weight", Init("normal", last**-0.5) if factor == "A" else Init("zeros")
                params += [
                    Param(f"{factor}_left.{name}", (E, first, first), Init("normal", first**-0.5)),
                    Param(
                        f"{factor}_central.{name}", (first, self.r, middle, last), Init("uniform", max(n, 1) ** -0.5)
                    ),
                    Param(f"{factor}_right.{name}", (E, last, last), q_init),
                ]
        return params

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The matrices, put together."""
        name = role or "weight"
        if not parts["A_central"].has(name):
            return None
        a_ERD, b_ERO = (self._matrices(parts, factor, name) for factor in "AB")
        return Factors(a_ERD, b_ERO.transpose(1, 2), scaling)

    def _matrices(self, parts: Mapping[str, AdapterTensors], factor: str, name: str) -> Tensor:
        """A of all experts, or B transposed: [E, R, n]."""
        left_EAI, central_ARJB, right_EBK = (
            parts[f"{factor}_{part}"].tensor(name) for part in ("left", "central", "right")
        )
        if self.gradient_mask > 0 and parts[f"{factor}_central"].training:
            # drawn without gradients too: a first pass of checkpointing must leave the random state as a second does
            masked = torch.rand(central_ARJB.shape, device=central_ARJB.device) < self.gradient_mask
            central_ARJB = torch.where(masked, central_ARJB.detach(), central_ARJB)
        half_EIRJB = torch.einsum("eai,arjb->eirjb", left_EAI, central_ARJB)
        return torch.einsum("eirjb,ebk->erijk", half_EIRJB, right_EBK).flatten(2)


def split(n: int, ends: int) -> tuple[int, int, int]:
    """(I, J, K) of n features: the ends are divisors of at most `ends`."""
    first = max(d for d in range(1, ends + 1) if n % d == 0)
    last = max(d for d in range(1, ends + 1) if n // first % d == 0)
    return first, n // first // last, last
