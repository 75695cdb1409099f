"""One place of an adapter in a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from torch import nn

from moelora.choices import Place, Site
from moelora.config import MoeLoraConfig
from moelora.layers.modules import FeedForwardForm, linear_size


@dataclass(frozen=True)
class PlannedSite(Place):
    """One module to wrap.

    Attributes:
        name: Its name in the base model, without any adapter's wrapping.
        roles: Linears that get experts: "" of a single linear; of a block "up", "down", "gate".
        linears: Names of all its linears by role, with experts or without.
        routed: Whether it gets a router.
        form: The form of the block; None for a single linear.
        passing: Names of the modules behind it that the block's output passes through unchanged.
        router: Name of the site that holds the router it uses; None is the site itself.
        width: Features of a block that is wrapped whole, without regard to its linears; 0 if it is not.
        base_router: Name of the router of such a block.
        input_of: A key that it shares with the sites that may have the same input; "" without any.
    """

    name: str
    roles: tuple[str, ...]
    linears: dict[str, str]
    routed: bool
    form: FeedForwardForm | None = None
    passing: tuple[str, ...] = ()
    router: str | None = None
    width: int = 0
    base_router: str | None = None
    input_of: str = ""

    def sizes(self, modules: Mapping[str, nn.Module]) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) by role: of all linears, or of the block that is wrapped whole."""
        if self.width:
            return {"": (self.width, self.width)}
        return {role: linear_size(modules[name]) for role, name in self.linears.items()}

    def declare(self, config: MoeLoraConfig, sizes: Mapping[str, tuple[int, int]]) -> Site:
        """What the choices of a configuration may know of it, to declare their tensors.

        Args:
            config: The configuration.
            sizes: (in_features, out_features) of all its linears, by role.
        """
        site = Site(
            name=self.name,
            linears={role: sizes[role] for role in self.roles},
            num_experts=config.experts.num_experts_at(self.member, self.num_members) if self.routed else 1,
            routed=self.routed,
            router_features=sizes["" if self.form is None else "up"][0],
            owns_router=self.router is None,
            num_null=config.experts.null_experts if self.routed else 0,
            **{field.name: getattr(self, field.name) for field in fields(Place)},
        )
        return replace(site, router_features=config.experts.router_features(site))
