"""What a saved adapter is, told by its configuration and the header of its safetensors file alone."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from moelora.choices import Param
from moelora.choices import Site as SiteOfChoices
from moelora.config import MoeLoraConfig

SiteKind = Literal["feed-forward mixture", "linear mixture", "plain LoRA", "plain DoRA", "own experts", "saved whole"]


@dataclass(frozen=True)
class TensorHeader:
    """Name, dtype (in safetensors' words) and shape of a stored tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Size in the file."""
        digits = re.search(r"\d+", self.dtype)
        return self.numel * (int(digits[0]) // 8 if digits else 1)


@dataclass(frozen=True, kw_only=True)
class Site:
    """Adapted modules that differ only in their layer.

    Attributes:
        module: Their name in the base model, with `*` for the layer's number.
        kind: What sits there.
        num_experts: Stored experts of each (1 without a mixture, 0 where a module is saved whole).
        roles: Which linears of a feed-forward block have experts.
        experts: What stands there; empty where a module is saved whole.
        layers: The layers' numbers.
        count: Number of modules.
        num_parameters: Stored values of all of them, buffers included.
        num_trainable: Those that training moves.
    """

    module: str
    kind: SiteKind
    num_experts: int
    roles: tuple[str, ...]
    layers: tuple[int, ...]
    count: int
    num_parameters: int
    num_trainable: int
    experts: str = ""

    def describe(self) -> str:
        """One phrase for a table."""
        return self.experts or self.kind

    def layer_ranges(self) -> str:
        """The layers as ranges: "0-3, 7"; empty outside numbered layers."""
        ranges: list[list[int]] = []
        for layer in self.layers:
            if ranges and ranges[-1][1] == layer - 1:
                ranges[-1][1] = layer
            else:
                ranges.append([layer, layer])
        return ", ".join(str(low) if low == high else f"{low}-{high}" for low, high in ranges)


@dataclass(frozen=True, kw_only=True)
class AdapterInfo:
    """A saved adapter: where it is, its configuration, and the headers of its stored tensors."""

    source: str
    config: MoeLoraConfig
    tensors: tuple[TensorHeader, ...]

    @property
    def num_parameters(self) -> int:
        """Stored values."""
        return sum(tensor.numel for tensor in self.tensors)

    @property
    def num_trainable(self) -> int:
        """Stored values that training moves: all but routing biases and frozen routers."""
        return sum(site.num_trainable for site in self.sites())

    @property
    def num_bytes(self) -> int:
        """Size of the stored values."""
        return sum(tensor.num_bytes for tensor in self.tensors)

    @property
    def is_routed(self) -> bool:
        """Whether there is any mixture, as opposed to plain LoRA only."""
        return any(site.kind.endswith(("mixture", "own experts")) for site in self.sites())

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the stored tensors."""
        return tuple(sorted({tensor.dtype for tensor in self.tensors}))

    def axes(self) -> dict[str, str]:
        """A phrase for each axis that shapes the adapter: the choice and its settings."""
        phrases = self.config.describe()
        del phrases["compute"]  # how it was computed is no property of the adapter
        return phrases

    def sites(self) -> list[Site]:
        """The adapted modules, those that differ only in their layer together."""
        modules: dict[str, list[TensorHeader]] = {}
        for tensor in self.tensors:
            modules.setdefault(_module_of(tensor.name), []).append(tensor)
        groups: dict[tuple[str, SiteKind, int, tuple[str, ...]], list[str]] = {}
        for module, tensors in modules.items():
            pattern = re.sub(r"(?<=\.)\d+(?=\.|$)", "*", module, count=1)
            groups.setdefault((pattern, *_kind_of(tensors, self.config)), []).append(module)
        sites = []
        for (pattern, kind, num_experts, roles), members in groups.items():
            tensors = [tensor for module in members for tensor in modules[module]]
            routed = not kind.startswith("plain")
            trained = self._trained_names(num_experts, roles, routed)
            layers = {int(match[0]) for module in members if (match := re.search(r"(?<=\.)\d+(?=\.|$)", module))}
            site = Site(
                module=pattern,
                kind=kind,
                num_experts=num_experts,
                roles=roles,
                experts=self.config.experts.site_phrase(num_experts, routed, roles) if num_experts else "",
                layers=tuple(sorted(layers)),
                count=len(members),
                num_parameters=sum(tensor.numel for tensor in tensors),
                num_trainable=sum(tensor.numel for tensor in tensors if self._is_trained(tensor.name, trained)),
            )
            sites.append(site)
        return sites

    def missing(self) -> list[str]:
        """The tensors that are not stored beside others of their module or of the mixtures of its name.

        A module none of whose tensors are stored does not show without the base model.
        """
        modules: dict[str, list[TensorHeader]] = {}
        for tensor in self.tensors:
            if ".moelora_" in tensor.name:
                modules.setdefault(_module_of(tensor.name), []).append(tensor)
        shared = self.config.placement.routers != "per_site"
        held = {tensor.name.partition(".moelora_")[2] for tensors in modules.values() for tensor in tensors}
        lacking: list[str] = []
        routers: dict[str, set[str]] = {}
        for module, tensors in modules.items():
            stored = {tensor.name.partition(".moelora_")[2] for tensor in tensors}
            kind, num_experts, _ = _kind_of(tensors, self.config)
            roles = _roles_of(stored, self.config)
            # without any B the number of experts is that of another tensor
            count = num_experts or max(tensor.shape[0] for tensor in tensors)
            routed = not kind.startswith("plain") and self.config.placement.routes_any
            # what sites share is stored where the first of them is
            pieces = self._declared(count, roles, routed)
            declared = {piece.name for piece in pieces if not piece.shared or piece.name not in held}
            if shared and routed:
                of_router = {name for name in declared if name.startswith("router.")}
                routers[module] = of_router - stored
                declared -= of_router
            lacking += [f"{module}.moelora_{name}" for name in sorted(declared - stored)]
        if routers:  # one module holds the router of all
            holder = min(routers, key=lambda module: len(routers[module]))
            lacking += [f"{holder}.moelora_{name}" for name in sorted(routers[holder])]
        return lacking

    def _trained_names(self, num_experts: int, roles: tuple[str, ...], routed: bool) -> set[str]:
        """What training moves of the tensors that the choices declare at a site, by the ends of their names."""
        return {piece.name for piece in self._declared(num_experts, roles, routed) if piece.trainable}

    def _declared(self, num_experts: int, roles: tuple[str, ...], routed: bool) -> list[Param]:
        """The tensors that the choices declare at a site, as they are stored."""
        site = SiteOfChoices(
            name="",
            linears=dict.fromkeys(roles or ("",), (0, 0)),  # which anything divides: the names are what is asked for
            num_experts=num_experts,
            routed=routed,
            router_features=1,
        )
        routers = [replace(param, name=f"router.{param.name}") for param in self.config.router_params(site)]
        declared = [*self.config.expert_params(site), *routers] if num_experts else []
        return [piece for param in declared for piece in param.stored()]

    def _is_trained(self, name: str, trained: set[str]) -> bool:
        _, ours, tensor = name.partition(".moelora_")
        if ours:
            return tensor in trained
        if name.endswith(".trainable_tokens_delta"):
            return True
        if name.endswith(".bias") and self.config.bias != "none":
            return True
        # Anything else is trained only by request: PEFT also saves a resized embedding that nothing trained.
        return bool(set(name.split(".")) & set(self.config.modules_to_save or ()))


def _module_of(tensor: str) -> str:
    name = tensor.removeprefix("base_model.model.")
    adapted, marker, _ = name.partition(".moelora_")
    return adapted if marker else name.rpartition(".")[0]


def _roles_of(stored: Iterable[str], config: MoeLoraConfig) -> tuple[str, ...]:
    """Which linears of a feed-forward block have experts; the names of factors end with them."""
    ends = {name.removesuffix("_frozen").partition(".")[2] for name in stored}
    has_factors = config.experts.is_low_rank or config.experts.has_stacks
    return tuple(role for role in ("gate", "up", "down") if has_factors and role in ends)


def _kind_of(tensors: list[TensorHeader], config: MoeLoraConfig) -> tuple[SiteKind, int, tuple[str, ...]]:
    """Kind, number of experts, and roles of a module's tensors."""
    if not config.experts.has_stacks and any(".moelora_" in tensor.name for tensor in tensors):
        roles = _roles_of((tensor.name.partition(".moelora_")[2] for tensor in tensors), config)
        placement = config.placement
        if placement.routes_any and not roles and not placement.routes_linear(_module_of(tensors[0].name)):
            return "plain LoRA", 1, ()
        return "own experts", config.experts.num_experts, roles
    parts: Mapping[str, TensorHeader] = {
        tensor.name.partition(".moelora_")[2]: tensor for tensor in tensors if ".moelora_" in tensor.name
    }
    counts: dict[str, int] = {}
    for part, tensor in parts.items():
        factor, _, role = part.removesuffix("_frozen").partition(".")
        if factor == "B":
            counts[role] = counts.get(role, 0) + tensor.shape[0]
    if not counts:
        return "saved whole", 0, ()
    num_experts = max(counts.values())
    roles = tuple(role for role in ("gate", "up", "down") if role in counts)
    if roles:
        return "feed-forward mixture", num_experts, roles
    routed = num_experts > 1 or any(part.startswith("router.") for part in parts)
    if routed:
        return "linear mixture", num_experts, ()
    return ("plain DoRA" if config.experts.kind == "dora" else "plain LoRA"), num_experts, ()
