"""Two forwards that draw other experts are to predict alike.

Shape suffixes: N positions that have a label, V words of the vocabulary or classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.balance.base import Balance, Reads
from moelora.choices import register


@register
@dataclass(frozen=True, kw_only=True)
class Consistency(Balance):
    """`(KL(p || q) + KL(q || p)) / 2` of two forwards' predictions p and q, the mean over labelled positions.

    The consistency regularisation of THOR (arXiv 2110.04260), where the two forwards draw other experts; dropout makes
    them differ too. 0 if they agree. The trainers run the two forwards beside their own, whatever their own loss is,
    so that a step costs three forwards; their batches need labels.

    Args:
        coef: Coefficient of the loss. 0 switches it off, and the forwards.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "consistency"
    logged_as: ClassVar[str] = "consistency_loss"
    reads: ClassVar[Reads] = "predictions"
    coef_name: ClassVar[str] = "consistency_coef"

    def compared(self, first_NV: Tensor, second_NV: Tensor) -> Tensor:
        """See `Balance.compared`; in fp32."""
        log_p_NV, log_q_NV = first_NV.float().log_softmax(-1), second_NV.float().log_softmax(-1)
        return 0.5 * ((log_p_NV.exp() - log_q_NV.exp()) * (log_p_NV - log_q_NV)).sum()
