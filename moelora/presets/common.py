"""What presets share."""

from __future__ import annotations

from typing import Any


def balance_of(coef: float, z_loss_coef: float, kind: str = "switch") -> list[dict[str, Any]]:
    """The balance losses of a preset, a load-balancing loss and a router z-loss; both are logged if one is added."""
    return [{"kind": kind, "coef": coef}, {"kind": "z", "coef": z_loss_coef}] if coef != 0 or z_loss_coef != 0 else []
