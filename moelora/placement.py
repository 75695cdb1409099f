"""Where an adapter goes: from a configuration and a base model to the list of its sites.

All checks happen here, before any module is replaced, so that a configuration that does not fit leaves the model as it
was.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

from peft.tuners.tuners_utils import (
    BaseTunerLayer,
    _get_in_out_features,
    _maybe_include_all_linear_layers,
    check_target_module_exists,
)
from peft.utils import TaskType
from peft.utils.other import AuxiliaryTrainingWrapper, match_target_against_key
from torch import nn

from moelora.config import MoeLoraConfig
from moelora.errors import TargetError
from moelora.experts.stack import lora_parameter_count
from moelora.layers.base import MoeLoraLayer
from moelora.layers.block_form import FeedForwardForm, find_form, is_linear, looks_like_feed_forward
from moelora.layers.feed_forward import MixtureFeedForward

CLASSIFIER_NAMES = ("classifier", "score")
"""Heads that PEFT trains whole for classification tasks."""


@dataclass(frozen=True)
class Site:
    """One module to wrap.

    Attributes:
        name: Its name in the base model, without any adapter's wrapping.
        roles: Linears that get experts: "" of a single linear; of a block "up", "down", "gate".
        form: The form of the block; None for a single linear.
        routed: Whether it gets a router.
    """

    name: str
    roles: tuple[str, ...]
    form: FeedForwardForm | None
    routed: bool


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model under their own names, whatever adapters sit on it.

    A wrapped module comes once, as its outermost tuner layer; the adapters' own modules do not come.
    """
    for key, module in _walk(model, ""):
        yield key, module


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    inner = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    for child_name, child in inner.named_children():
        yield from _walk(child, f"{name}.{child_name}" if name else child_name)


def resolve_all_linear(model: nn.Module, config: MoeLoraConfig) -> None:
    """Replace "all-linear" in `config.target_modules` by names: every linear but the output head."""
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return
    linears = {name for name, module in base_modules(model) if name and is_linear(module)}
    if any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        heads = {name for name in linears if name.rsplit(".", 1)[-1] in ("lm_head", *CLASSIFIER_NAMES)}
        output = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
        heads |= {name for name, module in base_modules(model) if module is output}
        names = linears - heads
    else:
        names = linears & set(_maybe_include_all_linear_layers(config, model).target_modules)  # type: ignore[arg-type]
    endings = {name.rsplit(".", 1)[-1] for name in names}
    same = {name for name, _ in base_modules(model) if name.rsplit(".", 1)[-1] in endings}
    config.target_modules = endings if same == names else names


def _matches(pattern: str | list[str] | None, key: str) -> bool:
    if pattern is None:
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
        TargetError: If nothing matches, a target is not a linear, a block fits no known form, or the plan conflicts
            with an adapter that is already there.
    """
    resolve_all_linear(model, config)
    modules = dict(base_modules(model))
    targeted = [name for name in modules if name and check_target_module_exists(config, name)]
    if not targeted:
        some = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if name and is_linear(module)})
        raise TargetError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}, "
            f"layers_to_transform={config.layers_to_transform!r}) match no module of {type(model).__name__}; its "
            f"linears end in: {', '.join(some) or 'none'}."
        )
    for name in targeted:
        if not is_linear(modules[name]):
            raise TargetError(
                f"target {name!r} is a {type(modules[name]).__name__}; allowed: linears (nn.Linear, Conv1D, quantised "
                "linears). Name its linears in target_modules, or train it whole with modules_to_save."
            )
    if config.placement.feed_forward:
        sites = _plan_blocks(modules, targeted, config)
    else:
        sites = {name: _linear_site(name, config) for name in targeted}
    _check_conflicts(modules, sites)
    return sites


def _linear_site(name: str, config: MoeLoraConfig) -> Site:
    unrouted = config.placement.unrouted_modules
    routed = unrouted != "rest" and not _matches(unrouted, name)
    return Site(name, ("",), None, routed)


def _plan_blocks(modules: dict[str, nn.Module], targeted: list[str], config: MoeLoraConfig) -> dict[str, Site]:
    sites: dict[str, Site] = {}
    blocks: dict[str, dict[str, str]] = {}
    forms: dict[str, FeedForwardForm] = {}
    for name in targeted:
        parent, _, child = name.rpartition(".")
        block = _unwrapped(modules[parent]) if parent else None
        if block is None or not looks_like_feed_forward(block):
            continue
        if parent not in forms:
            forms[parent] = find_form(block, parent)
        roles = {linear: role for role, linear in forms[parent].linears.items()}
        blocks.setdefault(parent, {})[name] = roles[child]
    if not blocks:
        raise TargetError(
            "placement.feed_forward=True, but none of the targeted linears is in a feed-forward block, a module with "
            f"two or three linears and an activation of its own (targets: {', '.join(targeted[:8])}, ...). Add the "
            "feed-forward linears to target_modules, or use a preset with a mixture on each linear (sira, smora, "
            "molora)."
        )
    for name in targeted:
        parent = name.rpartition(".")[0]
        if name not in blocks.get(parent, {}):
            sites[name] = _linear_site(name, config)
        elif parent not in sites:
            sites[parent] = Site(parent, tuple(sorted(blocks[parent].values())), forms[parent], routed=True)
    order = {name: index for index, name in enumerate(modules)}
    return dict(sorted(sites.items(), key=lambda item: order[item[0]]))


def _unwrapped(module: nn.Module) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_conflicts(modules: dict[str, nn.Module], sites: dict[str, Site]) -> None:
    wrapped = {name: module for name, module in modules.items() if isinstance(module, BaseTunerLayer)}
    for name, site in sites.items():
        module = wrapped.get(name)
        if module is not None and not isinstance(module, MoeLoraLayer):
            raise TargetError(
                f"{name!r} already carries a {type(module).__name__} of another PEFT method; allowed: a plain module, "
                "or one with moelora adapters. Unload the other adapter first."
            )
        inside = [other for other in wrapped if other.startswith(f"{name}.")]
        around = [
            other
            for other, layer in wrapped.items()
            if name.startswith(f"{other}.") and isinstance(layer, MixtureFeedForward)
        ]
        if inside or around:
            raise TargetError(
                f"this adapter wraps {name!r} {'as a whole block' if site.form else 'as a linear'}, another one on "
                f"this model wraps {(inside or around)[0]!r}; allowed: adapters that treat a feed-forward block alike. "
                "Load the two adapters on separate copies of the base model."
            )


def count_trainable_parameters(model: nn.Module, config: MoeLoraConfig) -> int:
    """What `MoeLoraConfig.num_trainable_parameters` returns.

    Raises:
        TargetError: If the configuration does not fit the model.
    """
    planned = MoeLoraConfig(**{**config.to_dict(), "target_modules": config.target_modules})
    sites = plan_sites(model, planned)
    modules = dict(base_modules(model))
    experts, routing = planned.experts, planned.routing
    total = 0
    for site in sites.values():
        module = _unwrapped(modules[site.name])
        num_experts = experts.num_experts if site.routed else 1
        linears = site.form.linears if site.form is not None else {"": ""}
        router_features = 0
        for role, child in linears.items():
            linear = _unwrapped(getattr(module, child)) if child else module
            in_features, out_features = _get_in_out_features(linear)
            assert in_features is not None and out_features is not None
            if role in site.roles:
                total += lora_parameter_count(num_experts, experts.r, in_features, out_features)
            if role in ("", "up"):
                router_features = in_features
        if site.routed and routing.trainable:
            total += num_experts * router_features
    return total + _count_extra(model, modules, planned, sites)


def _count_extra(
    model: nn.Module, modules: dict[str, nn.Module], config: MoeLoraConfig, sites: dict[str, Site]
) -> int:
    """Parameters of modules saved whole, of trained biases and of trained tokens."""
    saved = list(config.modules_to_save or [])
    if config.task_type in (TaskType.SEQ_CLS, TaskType.TOKEN_CLS):
        saved += CLASSIFIER_NAMES
    counted: dict[int, int] = {}
    for name, module in modules.items():
        if any(name == ending or name.endswith(f".{ending}") for ending in saved):
            counted.update((id(parameter), parameter.numel()) for parameter in _unwrapped(module).parameters())
    if config.bias != "none":
        for name, parameter in model.named_parameters():
            owner = name.rpartition(".")[0]
            is_bias = name == "bias" or name.endswith(".bias")
            if is_bias and (config.bias == "all" or owner in sites):
                counted[id(parameter)] = parameter.numel()
    total = sum(counted.values())
    indices = config.trainable_token_indices
    if indices:
        by_module = indices if isinstance(indices, dict) else {_input_embedding_name(model): indices}
        for ending, tokens in by_module.items():
            embedding = next(m for n, m in modules.items() if n == ending or n.endswith(f".{ending}"))
            total += len(tokens) * embedding.weight.shape[1]  # type: ignore[union-attr,index]
    return total


def _input_embedding_name(model: nn.Module) -> str:
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return next(re.sub(r"^.*\.", "", name) for name, module in model.named_modules() if module is embeddings)
