"""Balance by moving a bias on the routers' scores.

Shape suffixes: L routers, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.choices import register
from moelora.errors import ConfigError


@register
@dataclass(frozen=True, kw_only=True)
class BiasUpdate(Balance):
    """`b += rate * sign(mean(n) - n)` after each training forward, n the number of tokens of each expert (SMoRA).

    An expert that got fewer tokens than the mean is raised, else lowered (arXiv 2501.15103). No loss.
    DeepSeek-V3 (arXiv 2412.19437) moves its bias likewise, by 1e-3; there it only selects (`bias_weighs=False`).

    Args:
        coef: Step of the update.

    Raises:
        ConfigError: For a negative step.
    """

    kind: ClassVar[str] = "bias_update"
    is_loss: ClassVar[bool] = False
    coef_name: ClassVar[str] = "bias_update_rate"

    def check(self, config: Any) -> None:
        """Refuse routers without a bias, or without a choice to balance.

        Raises:
            ConfigError: With the reason.
        """
        if not getattr(config.scores, "bias", False):
            raise ConfigError(
                f"balance 'bias_update' moves a bias that {config.scores.kind!r} scores do not have; allowed: scores "
                "with bias=True."
            )
        if config.selection.is_dense:
            raise ConfigError("balance 'bias_update' counts choices, and with dense selection all experts get all.")

    def move(self, load_LE: Tensor) -> Tensor:
        """See `Balance.move`."""
        return self.coef * torch.sign(load_LE.mean(-1, keepdim=True) - load_LE)
