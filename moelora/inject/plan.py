"""Where an adapter goes: from a configuration and a base model to the list of its sites.

All checks happen here, before any module is replaced, so that a configuration that does not fit leaves the model as it
was.
"""

from __future__ import annotations

from dataclasses import replace

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import match_target_against_key
from torch import nn

from moelora.config import MoeLoraConfig
from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules
from moelora.inject.besides import check_besides
from moelora.inject.blocks import find_form, looks_like_feed_forward
from moelora.inject.site import Site
from moelora.inject.split_blocks import check_split_block, find_split_blocks
from moelora.inject.targets import find_targets, resolve_all_linear
from moelora.layers.base import MoeLoraLayer
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.modules import unwrapped


def _matches_explicitly(pattern: str | list[str] | None, key: str) -> bool:
    if pattern is None or pattern == "rest":
        return False
    if isinstance(pattern, str):
        return bool(match_target_against_key(pattern, key))
    return any(key == ending or key.endswith(f".{ending}") for ending in pattern)


def plan_sites(model: nn.Module, config: MoeLoraConfig) -> dict[str, Site]:
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
    resolve_all_linear(model, config)
    modules = dict(base_modules(model))
    targeted = find_targets(model, modules, config)
    if config.placement.feed_forward:
        sites = _plan_blocks(modules, targeted, config)
    else:
        sites = {name: _linear_site(name, config) for name in targeted}
    _check_unrouted(config, targeted)
    _check_conflicts(modules, sites)
    check_besides(model, modules, config, sites)
    return sites


def _linear_site(name: str, config: MoeLoraConfig) -> Site:
    unrouted = config.placement.unrouted_modules
    routed = unrouted != "rest" and not _matches_explicitly(unrouted, name)
    return Site(name, ("",), {"": name}, routed)


def _plan_blocks(modules: dict[str, nn.Module], targeted: list[str], config: MoeLoraConfig) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    blocks: dict[str, Site] = {}
    splits = find_split_blocks(modules)
    for name in targeted:
        parent = name.rpartition(".")[0]
        if name in splits:
            block = splits[name].first
            if block not in blocks:
                check_split_block(modules, splits[name])
                blocks[block] = Site(block, (), splits[name].linears, True, splits[name].form, split=True)
        elif parent and looks_like_feed_forward(unwrapped(modules[parent])):
            block = parent
            if block not in blocks:
                form = find_form(unwrapped(modules[parent]), parent)
                linears = {role: f"{parent}.{child}" for role, child in form.linears.items()}
                blocks[block] = Site(block, (), linears, True, form)
        else:
            sites[name] = _linear_site(name, config)
            continue
        if _matches_explicitly(config.placement.unrouted_modules, name):
            raise TargetError(
                f"placement.unrouted_modules={config.placement.unrouted_modules!r} match {name!r}, which is in the "
                f"feed-forward block {block!r}; allowed: linears outside the blocks. With feed_forward=True a block "
                "is routed as a whole; leave the linear out with exclude_modules, or set feed_forward=False."
            )
        site = blocks[block]
        role = next(role for role, linear in site.linears.items() if linear == name)
        sites[block] = blocks[block] = replace(site, roles=tuple(sorted((*site.roles, role))))
    if not blocks:
        raise TargetError(
            "placement.feed_forward=True, but none of the targeted linears is in a feed-forward block, a module with "
            f"two or three linears and an activation of its own (targets: {', '.join(targeted[:8])}, ...). Add the "
            "feed-forward linears to target_modules, or use a preset with a mixture on each linear (sira, smora, "
            "molora)."
        )
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(sites.items(), key=lambda item: order[item[0]]))


def _check_unrouted(config: MoeLoraConfig, targeted: list[str]) -> None:
    unrouted = config.placement.unrouted_modules
    if unrouted in (None, "rest") or any(_matches_explicitly(unrouted, name) for name in targeted):
        return
    raise TargetError(
        f"placement.unrouted_modules={unrouted!r} match none of the targets ({', '.join(targeted[:8])}, ...), so "
        "nothing would get a plain LoRA; allowed: name endings or a regex on full names, 'rest', or None."
    )


def _check_conflicts(modules: dict[str, nn.Module], sites: dict[str, Site]) -> None:
    """Refuse what an adapter that is there already wraps in another way."""
    owners: dict[int, str] = {}
    for name, layer in modules.items():
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
            if owner != site.name:
                raise TargetError(
                    f"this adapter wraps {site.name!r} {'as a whole block' if site.form else 'as a linear'}, another "
                    f"one on this model wraps {owner!r}; allowed: adapters that treat a feed-forward block alike. Load "
                    "the two adapters on separate copies of the base model."
                )
