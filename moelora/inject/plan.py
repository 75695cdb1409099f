"""Where an adapter goes: from a configuration and a base model to the list of its sites.

All checks happen here, before any module is replaced, so that a configuration that does not fit leaves the model as it
was.
"""

from __future__ import annotations

import copy
import os
import re
from collections.abc import Iterator
from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moelora.choices import Param
from moelora.config import MoeLoraConfig
from moelora.errors import ConfigError, TargetError
from moelora.inject.base_modules import base_modules
from moelora.inject.besides import check_besides, count_besides
from moelora.inject.parts import features_of, is_causal
from moelora.inject.site import PlannedSite
from moelora.inject.targets import find_target_blocks, find_targets, resolve_all_linear
from moelora.layers.base import MoeLoraLayer
from moelora.layers.block import MixtureBlock
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.modules import unwrapped


def plan_sites(model: nn.Module, config: MoeLoraConfig) -> dict[str, PlannedSite]:
    """Decide which module gets which layer.

    Args:
        model: The base model; it may carry moelora adapters already. It is not changed.
        config: The configuration; "all-linear" is replaced by names.

    Returns:
        Sites by name, in the order of the model.

    Raises:
        TargetError: If nothing matches, a target cannot be adapted, a block fits no known form, or the plan conflicts
            with an adapter that is already there.
    """
    modules = dict(base_modules(model))
    if config.placement.wraps_moe_blocks:
        targeted = find_target_blocks(model, modules, config)
    else:
        resolve_all_linear(model, config)
        targeted = find_targets(model, modules, config)
    sites: dict[str, PlannedSite] = config.placement.share_routers(config.placement.plan(modules, targeted))
    sites = _in_families(modules, sites)
    config.placement.check_unrouted(targeted)
    _check_conflicts(modules, sites)
    for site in sites.values():
        sizes = site.sizes(modules)
        declared = site.declare(config, sizes)
        for choice in config.choices():
            choice.check_site(declared)
        config.expert_params(declared)  # what does not fit is refused before any module is replaced
    check_besides(model, modules, config, sites)
    _check_size(modules, config, sites)
    return sites


def _in_families(modules: dict[str, nn.Module], sites: dict[str, PlannedSite]) -> dict[str, PlannedSite]:
    """The sites, each with its number among those of its sort, and what the model says of its sizes."""
    families: dict[str, list[str]] = {}
    for name, site in sites.items():
        sizes = list(site.sizes(modules).values())
        families.setdefault(f"{re.sub(r'[0-9]+', '*', name)} {sizes}", []).append(name)
    hidden, head = features_of(modules[""])
    found = {
        name: replace(
            sites[name],
            family=family,
            member=member,
            num_members=len(names),
            head_features=head,
            causal=is_causal(modules, name),
            model_features=hidden,
        )
        for family, names in families.items()
        for member, name in enumerate(names)
    }
    return {name: found[name] for name in sites}


def count_trainable_parameters(model: nn.Module, config: MoeLoraConfig) -> int:
    """What `MoeLoraConfig.num_trainable_parameters` returns: the numbers that the choices declare.

    Raises:
        TargetError: If the configuration does not fit the model.
    """
    planned = copy.copy(config)
    sites = plan_sites(model, planned)
    modules = dict(base_modules(model))
    total = count_besides(model, modules, planned, sites)
    return total + sum(param.num_trainable for param in _declared(modules, planned, sites))


def _declared(modules: dict[str, nn.Module], config: MoeLoraConfig, sites: dict[str, PlannedSite]) -> Iterator[Param]:
    """The tensors of all experts and routers; those that sites share come once."""
    seen: set[tuple[str, str]] = set()
    for site in sites.values():
        declared = site.declare(config, site.sizes(modules))
        params = [*config.expert_params(declared), *config.router_params(declared)]
        yield from (param for param in params if (param.shared, param.name) not in seen)
        seen |= {(param.shared, param.name) for param in params if param.shared}


def _check_size(modules: dict[str, nn.Module], config: MoeLoraConfig, sites: dict[str, PlannedSite]) -> None:
    """Refuse an adapter that no memory holds, before any of it is made.

    Raises:
        ConfigError: Says how large it would be.
    """
    count = sum(param.numel for param in _declared(modules, config, sites))
    memory = _memory()
    if memory is not None and 4 * count > memory:
        raise ConfigError(
            f"num_experts={config.experts.num_experts} and r={config.experts.r} make {count:,} parameters, "
            f"{4 * count / 1e9:,.0f} GB in float32; allowed: what fits into this machine's {memory / 1e9:,.0f} GB. "
            "Lower one of them, or target fewer modules."
        )


def _memory() -> int | None:
    """Bytes of memory of this machine; None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None


def _check_conflicts(modules: dict[str, nn.Module], sites: dict[str, PlannedSite]) -> None:
    """Refuse what an adapter that is there already wraps in another way."""
    owners: dict[int, str] = {}
    for name, layer in modules.items():
        if isinstance(layer, MixtureBlock):
            continue  # it wraps no linear
        if isinstance(layer, MixtureFeedForward):
            owners |= {id(layer.linear(role)): name for role in layer.form.linears}
        elif isinstance(layer, BaseTunerLayer):
            owners[id(unwrapped(layer))] = name
    for site in sites.values():
        for linear in site.linears.values():
            owner = owners.get(id(unwrapped(modules[linear])))
            if owner is None:
                continue
            if not isinstance(modules[owner], MoeLoraLayer):
                raise TargetError(
                    f"{owner!r} already carries a {type(modules[owner]).__name__} of another PEFT method; allowed: a "
                    "plain module, or one with moelora adapters. Unload the other adapter first."
                )
            kind, other = (
                "as a whole block" if is_block else "as a linear"
                for is_block in (site.form is not None, isinstance(modules[owner], MixtureFeedForward))
            )
            if (owner, other) != (site.name, kind):
                raise TargetError(
                    f"this adapter wraps {site.name!r} {kind}, another one on this model wraps {owner!r} {other}; "
                    "allowed: adapters that treat a feed-forward block alike. Load the two adapters on separate copies "
                    "of the base model."
                )
