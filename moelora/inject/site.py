"""One place of an adapter in a base model."""

from __future__ import annotations

from dataclasses import dataclass

from moelora.layers.modules import FeedForwardForm


@dataclass(frozen=True)
class Site:
    """One module to wrap.

    Attributes:
        name: Its name in the base model, without any adapter's wrapping.
        roles: Linears that get experts: "" of a single linear; of a block "up", "down", "gate".
        linears: Names of all its linears by role, with experts or without.
        routed: Whether it gets a router.
        form: The form of the block; None for a single linear.
        split: Whether the block's `down` is in a sibling of the module.
    """

    name: str
    roles: tuple[str, ...]
    linears: dict[str, str]
    routed: bool
    form: FeedForwardForm | None = None
    split: bool = False
