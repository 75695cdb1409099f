"""Bottleneck adapters beside the last linear of a feed-forward block, which is one of the choices (MixDA).

Shape suffixes: T tokens, E choices, N = E - 1 adapters, F features of the linear's input, O of its output, M inner
features of an adapter.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput, Experts
from moelora.validation import check, is_count, is_index, is_share


@register
@dataclass(frozen=True, kw_only=True)
class BottleneckExperts(Experts):
    """`sum_n g_n (U_n gelu(D_n h)) + g_E W h`: adapters and the frozen linear, weighted by one gate (MixDA).

    arXiv 2306.05406. h is the linear's input, the hidden features of a feed-forward block. U starts at 0, D kaiming;
    each has a bias, which starts at 0. Unlike with a delta the linear itself is weighted, so that an adapter does not
    start at the base.

    Args:
        num_experts: E, the number of choices: the adapters, and as the last one the frozen linear.
        reduction: F / M; M is rounded down, to 1 at least.
        lora_dropout: Probability of dropping an element of h before D, in training.
        num_frozen: The first so many adapters are not trained.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "bottleneck"

    num_experts: int = 2
    reduction: int = 16
    lora_dropout: float = 0.0
    num_frozen: int = 0

    def __post_init__(self) -> None:
        E = self.num_experts
        fits = is_count(E) and E > 1
        check(fits, "experts.num_experts", E, "an integer of at least 2: one adapter and the frozen linear")
        check(is_count(self.reduction), "reduction", self.reduction, "an integer of at least 1")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        frozen = self.num_frozen
        check(is_index(frozen) and frozen < E, "experts.num_frozen", frozen, f"0 to the number of adapters ({E - 1})")

    def check(self, config: Any) -> None:
        """Refuse another place than the last linears of feed-forward blocks.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.placement.kind == "parts" and config.placement.parts == ["down"],
            "placement",
            config.placement.describe(),
            "{'kind': 'parts', 'parts': ['down']} with 'bottleneck' experts",
            "They stand beside the last linear of a feed-forward block.",
        )

    def frozen(self, num_experts: int) -> Self:
        """See `Choice.frozen`."""
        return replace(self, num_frozen=num_experts)

    def params(self, site: Site) -> list[Param]:
        """`down.weight` [N, M, F] and `up.weight` [N, O, M], and their biases `S.down` [N, M] and `S.up` [N, O]."""
        in_features, out_features = site.linears[""]
        N, M, frozen, zeros = (
            site.num_experts - 1,
            max(1, in_features // self.reduction),
            self.num_frozen,
            Init("zeros"),
        )
        return [
            Param("down.weight", (N, M, in_features), Init("kaiming"), num_frozen=frozen),
            Param("up.weight", (N, out_features, M), zeros, num_frozen=frozen),
            Param("S.down", (N, M), zeros, num_frozen=frozen),
            Param("S.up", (N, out_features), zeros, num_frozen=frozen),
        ]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        down, up = given.tensor("down.weight"), given.tensor("up.weight")
        gates_TE = given.route(given.x).gates_TE()
        h_TF = given.dropout(given.x.to(down.dtype)).flatten(0, -2)
        inner_TNM = F.gelu(torch.einsum("tf,nmf->tnm", h_TF, down) + given.tensor("S.down"))
        gates_TN = (given.scaling * gates_TE[:, :-1]).to(inner_TNM.dtype)
        added_TO = torch.einsum("tnm,nom->to", inner_TNM * gates_TN.unsqueeze(-1), up)
        added_TO = added_TO + gates_TN @ given.tensor("S.up").to(gates_TN.dtype)
        y = given.base(given.x)
        kept = gates_TE[:, -1].view(*y.shape[:-1], 1)
        return (kept * y + added_TO.view(y.shape)).to(y.dtype)
