"""One place of an adapter in a base model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import nn

from moelora.choices import Site
from moelora.config import MoeLoraConfig
from moelora.layers.modules import FeedForwardForm, linear_size


@dataclass(frozen=True)
class PlannedSite:
    """One module to wrap.

    Attributes:
        name: Its name in the base model, without any adapter's wrapping.
        roles: Linears that get experts: "" of a single linear; of a block "up", "down", "gate".
        linears: Names of all its linears by role, with experts or without.
        routed: Whether it gets a router.
        form: The form of the block; None for a single linear.
        split: Whether the block's `down` is in a sibling of the module.
        router: Name of the site that holds the router it uses; None is the site itself.
        index: Its number among the sites that share its router.
        num_sharing: How many these are.
        width: Features of a block that is wrapped whole, without regard to its linears; 0 if it is not.
        base_router: Name of the router of such a block.
        base_experts: Number of experts that it has rows for; 0 if it does not tell.
        part, head_features, causal, model_features, family, member, num_members: See `Site`.
    """

    name: str
    roles: tuple[str, ...]
    linears: dict[str, str]
    routed: bool
    form: FeedForwardForm | None = None
    split: bool = False
    router: str | None = None
    index: int = 0
    num_sharing: int = 1
    width: int = 0
    base_router: str | None = None
    base_experts: int = 0
    part: str = ""
    head_features: int = 0
    causal: bool | None = None
    model_features: int = 0
    family: str = ""
    member: int = 0
    num_members: int = 1

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
            index=self.index,
            num_sharing=self.num_sharing,
            base_experts=self.base_experts,
            part=self.part,
            head_features=self.head_features,
            causal=self.causal,
            model_features=self.model_features,
            family=self.family,
            member=self.member,
            num_members=self.num_members,
        )
        return replace(site, router_features=config.experts.router_features(site))
