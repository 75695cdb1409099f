"""The axis of placement: what a mixture wraps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, get_args

from peft.utils.other import match_target_against_key
from torch import Tensor, nn

from moelora.choices import Choice, register
from moelora.errors import TargetError
from moelora.inject.blocks import find_form, looks_like_feed_forward
from moelora.inject.moe_blocks import find_moe_blocks
from moelora.inject.parts import features_of, inputs_of, part_of
from moelora.inject.site import PlannedSite
from moelora.inject.split_blocks import check_split_block, find_split_blocks
from moelora.layers.modules import unwrapped
from moelora.validation import check, check_choice, check_pattern

Routers = Literal["per_site", "per_input", "per_model"]
Part = Literal["key", "value", "gate", "up", "down"]


@dataclass(frozen=True, kw_only=True)
class Placement(Choice):
    """Base of the choices of placement.

    Args:
        unrouted_modules: Targeted linears that get one ordinary LoRA instead of a mixture: a regex, a list of name
            endings as in `target_modules`, "rest" where the choice knows what that is, or None.
        routers: "per_site"; "per_model", one router for all sites, held by the first of them; or "per_input", one for
            queries, keys and values of an attention (in cross-attention for keys and values), and one for gate and up
            of a feed-forward block, which decides once for the input that they have in common. A draw, as of expert
            dropout, is then common, too. It is there for speed: routers are felt on small models.

    Raises:
        ConfigError: If it is none of these.
    """

    axis: ClassVar[str] = "placement"
    wraps_moe_blocks: ClassVar[bool] = False
    """Whether it wraps the mixture-of-experts blocks of the base model, not linears that are targeted."""

    unrouted_modules: str | list[str] | None = None
    routers: Routers = "per_site"

    def __post_init__(self) -> None:
        check_choice("placement.routers", self.routers, Routers)
        given = self.unrouted_modules
        if given is not None:
            check_pattern("placement.unrouted_modules", given, "'rest', a regex, a list of name endings, or None")
        if isinstance(given, (set, tuple)):
            object.__setattr__(self, "unrouted_modules", sorted(given))

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """The sites by name.

        Args:
            modules: The modules of the base model by name.
            targeted: Names of the linears that get an adapter.

        Raises:
            TargetError: If the targets do not fit the placement.
        """
        raise NotImplementedError

    def check(self, config: Any) -> None:
        """Refuse a router for several sites that could not serve them all.

        Raises:
            ConfigError: With the reason.
        """
        if self.routers == "per_input":
            self._check_per_input(config)
            return
        check(
            self.routers == "per_site" or (config.scores.ignores_input and config.selection.ignores_input),
            "placement.routers",
            self.routers,
            f"'per_site' with {config.scores.kind!r} scores and {config.selection.kind!r} selection",
            "They look at the input of each site, whose size and meaning differ.",
        )

    def _check_per_input(self, config: Any) -> None:
        one_size = config.experts.fewest == config.experts.num_experts
        for name, value, good, allowed in (
            ("placement", self.kind, self.kind == "linear", "'linear'"),
            ("scores", config.scores.kind, config.scores.kind == "linear", "'linear'"),
            ("experts", config.experts.kind, config.experts.is_low_rank, "LoRAs"),
            ("experts", config.experts.describe(), one_size, "as many experts in every layer"),
        ):
            check(
                good,
                name,
                value,
                f"{allowed} with placement.routers='per_input'",
                "One router could not serve the others.",
            )

    def share_routers(self, sites: Mapping[str, PlannedSite]) -> dict[str, PlannedSite]:
        """The sites, each with the name of the one that holds its router, and its number among those that share it."""
        if self.routers == "per_site":
            return dict(sites)
        groups: dict[str, list[str]] = {}
        for name, site in sites.items():
            if site.routed:
                groups.setdefault("" if self.routers == "per_model" else site.input_of or name, []).append(name)
        shared = {
            name: replace(sites[name], router=names[0] if index else None, index=index, num_sharing=len(names))
            for names in groups.values()
            for index, name in enumerate(names)
        }
        return {**sites, **shared}

    @property
    def routes_any(self) -> bool:
        """Whether there is anything that `unrouted_modules` leaves to a mixture."""
        return self.unrouted_modules != ".*"

    def phrase(self) -> str:
        """What is routed, for a table."""
        raise NotImplementedError

    def routes_linear(self, name: str) -> bool:
        """Whether a targeted linear outside feed-forward blocks has a mixture, not one ordinary LoRA."""
        return self.unrouted_modules != "rest" and not self.is_unrouted(name)

    def is_unrouted(self, name: str) -> bool:
        """Whether `unrouted_modules` names a linear explicitly."""
        pattern = self.unrouted_modules
        if pattern is None or pattern == "rest":
            return False
        if isinstance(pattern, str):
            return bool(match_target_against_key(pattern, name))
        return any(name == ending or name.endswith(f".{ending}") for ending in pattern)

    def check_unrouted(self, targeted: list[str]) -> None:
        """Refuse `unrouted_modules` that match nothing.

        Raises:
            TargetError: With the targets.
        """
        if self.unrouted_modules in (None, "rest") or any(map(self.is_unrouted, targeted)):
            return
        raise TargetError(
            f"placement.unrouted_modules={self.unrouted_modules!r} match none of the targets "
            f"({', '.join(targeted[:8])}, ...), so nothing would get a plain LoRA; allowed: name endings or a regex on "
            "full names, 'rest', or None."
        )


@register
@dataclass(frozen=True, kw_only=True)
class LinearPlacement(Placement):
    """Each targeted linear has a mixture and a router of its own."""

    kind: ClassVar[str] = "linear"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(
            self.unrouted_modules != "rest",
            "placement.unrouted_modules",
            self.unrouted_modules,
            "'rest' only with the placement 'feed_forward'",
            "Nothing would be routed; set unrouted_modules=None or name the linears.",
        )

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        return "each linear" if self.routes_any else "nothing"

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`."""
        inputs = inputs_of(modules, targeted) if self.routers == "per_input" else {}
        return {
            name: PlannedSite(name, ("",), {"": name}, self.routes_linear(name), input_of=inputs.get(name, ""))
            for name in targeted
        }


@register
@dataclass(frozen=True, kw_only=True)
class FeedForwardPlacement(Placement):
    """The targeted linears of a feed-forward block form one mixture of whole feed-forward experts (MixLoRA).

    A targeted linear outside the blocks gets one ordinary LoRA with `unrouted_modules="rest"` (the default), else a
    mixture of its own.
    """

    kind: ClassVar[str] = "feed_forward"

    unrouted_modules: str | list[str] | None = "rest"

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        plain = self.unrouted_modules == "rest"
        return f"whole feed-forward blocks; {'one unrouted expert on' if plain else 'and'} the other linears"

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`."""
        sites: dict[str, PlannedSite] = {}
        blocks: dict[str, PlannedSite] = {}
        splits = find_split_blocks(modules)
        for name in targeted:
            parent = name.rpartition(".")[0]
            if name in splits:
                split = splits[name]
                block = split.first
                if block not in blocks:
                    check_split_block(modules, split)
                    blocks[block] = PlannedSite(block, (), split.linears, True, split.form, passing=split.passing)
            elif parent and looks_like_feed_forward(unwrapped(modules[parent])):
                block = parent
                if block not in blocks:
                    form = find_form(unwrapped(modules[parent]), parent)
                    linears = {role: f"{parent}.{child}" for role, child in form.linears.items()}
                    blocks[block] = PlannedSite(block, (), linears, True, form)
            else:
                sites[name] = PlannedSite(name, ("",), {"": name}, self.routes_linear(name))
                continue
            if self.is_unrouted(name):
                raise TargetError(
                    f"placement.unrouted_modules={self.unrouted_modules!r} match {name!r}, which is in the "
                    f"feed-forward block {block!r}; allowed: linears outside the blocks. With the placement "
                    f"{self.kind!r} a block is routed as a whole; leave the linear out with exclude_modules, or use "
                    "the placement 'linear'."
                )
            site = blocks[block]
            role = next(role for role, linear in site.linears.items() if linear == name)
            sites[block] = blocks[block] = replace(site, roles=tuple(sorted((*site.roles, role))))
        if not blocks:
            raise TargetError(
                f"the placement is {self.kind!r}, but none of the targeted linears is in a feed-forward block, a "
                f"module with two or three linears and an activation of its own (targets: {', '.join(targeted[:8])}, "
                "...). Add the feed-forward linears to target_modules, or use a preset with a mixture on each linear "
                "(most have)."
            )
        order = {name: index for index, name in enumerate(modules)}
        return dict(sorted(sites.items(), key=lambda item: order[item[0]]))


@register
@dataclass(frozen=True, kw_only=True)
class BlockPlacement(FeedForwardPlacement):
    """The feed-forward blocks alone, each as a whole; targeted linears outside of them are left as they are."""

    kind: ClassVar[str] = "block"

    unrouted_modules: str | list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        nothing = self.unrouted_modules is None
        check(nothing, "placement.unrouted_modules", self.unrouted_modules, "None with the placement 'block'")

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        return "beside feed-forward blocks"

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`."""
        return {name: site for name, site in super().plan(modules, targeted).items() if site.form is not None}


@register
@dataclass(frozen=True, kw_only=True)
class FeedForwardLinearsPlacement(FeedForwardPlacement):
    """A mixture on each targeted linear of a feed-forward block, with one router that looks at the block's input.

    The decision of a token holds for all linears of the block: `y = W x + scaling * sum_e g_e B_e A_e x` at each of
    them, whose inputs differ. A targeted linear outside the blocks is as with the placement "feed_forward".
    """

    kind: ClassVar[str] = "feed_forward_linears"

    def check(self, config: Any) -> None:
        """Refuse experts that are more than what they add to a linear.

        Raises:
            ConfigError: With the reason.
        """
        super().check(config)
        check(
            config.experts.is_low_rank,
            "experts",
            config.experts.kind,
            "LoRAs with the placement 'feed_forward_linears'",
            "What they add to each linear is mixed there.",
        )

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        return super().phrase().replace("whole feed-forward blocks", "feed-forward linears, one router for a block")

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`."""
        sites = super().plan(modules, targeted)
        return {name: replace(site, by_linear=site.form is not None) for name, site in sites.items()}


@register
@dataclass(frozen=True, kw_only=True)
class PartsPlacement(Placement):
    """Of the targeted linears those that play a part, each with a mixture and a router of its own.

    Args:
        parts: Which parts: "key" and "value", the projections of attention, known by their names; "gate", "up" and
            "down", the linears of a feed-forward block, known by its structure. A block without a gate has "up" and
            "down", and a linear that is gate and up in one is "up".

    Raises:
        ConfigError: For another part.
    """

    kind: ClassVar[str] = "parts"

    parts: list[Part] = field(default_factory=lambda: ["key", "value", "down"])

    def __post_init__(self) -> None:
        super().__post_init__()
        given = self.parts
        known = isinstance(given, (list, tuple)) and bool(given) and set(given) <= set(get_args(Part))
        check(known, "placement.parts", given, f"a list of some of {', '.join(map(repr, get_args(Part)))}")
        object.__setattr__(self, "parts", list(given))
        nothing = self.unrouted_modules is None
        check(nothing, "placement.unrouted_modules", self.unrouted_modules, "None with the placement 'parts'")

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        names: dict[str, str] = {
            "key": "key projections",
            "value": "value projections",
            "gate": "the gates of feed-forward blocks",
            "up": "the first linears of feed-forward blocks",
            "down": "the last linears of feed-forward blocks",
        }
        whole = {"gate", "up", "down"} <= set(self.parts)
        rest = [names[part] for part in self.parts if not (whole and part in ("gate", "up", "down"))]
        return ", ".join([*rest, *(["the linears of feed-forward blocks"] if whole else [])])

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`."""
        splits = find_split_blocks(modules)
        sites = {}
        for name in targeted:
            part = part_of(modules, splits, name, self.parts)
            if part is not None:
                sites[name] = PlannedSite(name, ("",), {"": name}, True, part=part)
        if not sites:
            raise TargetError(
                f"none of the targeted linears ({', '.join(targeted[:8])}, ...) plays one of the parts "
                f"{', '.join(self.parts)}; allowed: the key and value projections of attention, and the linears "
                "of feed-forward blocks. Add them to target_modules, or leave target_modules out."
            )
        return sites


@register
@dataclass(frozen=True, kw_only=True)
class MoeBlockPlacement(Placement):
    """Beside the mixture-of-experts blocks that a base model has of its own: a mixture across each whole block (PERFT).

    `target_modules` may name blocks (endings or a regex); "all-linear" is all of them.
    """

    kind: ClassVar[str] = "moe_block"
    wraps_moe_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        nothing = self.unrouted_modules is None
        check(nothing, "placement.unrouted_modules", self.unrouted_modules, "None with the placement 'moe_block'")

    def phrase(self) -> str:
        """See `Placement.phrase`."""
        return "beside the base's own mixture-of-experts blocks"

    def plan(self, modules: Mapping[str, nn.Module], targeted: list[str]) -> dict[str, PlannedSite]:
        """See `Placement.plan`; `targeted` are the names of blocks."""
        features, _ = features_of(modules[""])
        blocks = {block.name: block for block in find_moe_blocks(modules)}
        sites = {}
        for name in targeted:
            others = [part for part in blocks[name].parts if part not in (name, blocks[name].experts)]
            router = others[0] if others else None
            weight = None if router is None else getattr(unwrapped(modules[router]), "weight", None)
            count = len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else 0
            sites[name] = PlannedSite(name, ("",), {}, True, width=features, base_router=router, base_experts=count)
        return sites
