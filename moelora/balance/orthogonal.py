"""Keeps the experts of a mixture apart: a loss of their weights, not of what is routed to them.

Shape suffixes: E experts, R rank of one expert, D input features, M = E * R.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.balance.base import Balance, Reads
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.ops.factors import Factors


@register
@dataclass(frozen=True, kw_only=True)
class OrthogonalLoss(Balance):
    """`sum_{e != f} |A_e A_f^T|^2 / (E (E - 1) R)` of rows of length one: what two experts read of the same directions.

    O-LoRA's penalty (arXiv 2310.14152), there between the LoRAs of tasks one after the other, here between the experts
    of a mixture. It is 0 where no two read a common direction, at most 1 where the rows within each are orthogonal. The
    mean over the linears of a site, then over the active sites with a router, whether they ran or not.

    Deviations: rows have length one, so that the loss cannot be lowered by making A small; the mean, not the sum.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "orthogonal"
    coef_name: ClassVar[str] = "balance.orthogonal_coef"
    logged_as: ClassVar[str] = "orthogonal_loss"
    reads: ClassVar[Reads] = "experts"

    def check(self, config: Any) -> None:
        """Refuse experts that have no A each.

        Raises:
            ConfigError: With the reason.
        """
        if not config.experts.is_low_rank or config.experts.kind == "lora_shared_a":
            raise ConfigError(
                f"balance 'orthogonal' keeps the A of experts apart, and {config.experts.kind!r} experts have no A "
                "each; allowed: experts that are LoRAs."
            )

    def of_experts(self, factors: Factors) -> Tensor:
        """See `Balance.of_experts`."""
        a_ERD = factors.a_ERD
        E, R, _ = a_ERD.shape
        if E == 1:
            return a_ERD.sum() * 0
        with no_autocast(a_ERD.device):
            a_MD = F.normalize(a_ERD.float(), dim=-1).flatten(0, 1)
            squares_EE = (a_MD @ a_MD.t()).square().view(E, R, E, R).sum((1, 3))
        return (squares_EE.sum() - squares_EE.diagonal().sum()) / (E * (E - 1) * R)
