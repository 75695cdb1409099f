"""From the target words of a configuration to the names of the linears that get an adapter."""

from __future__ import annotations

from collections.abc import Mapping

from peft.tuners.tuners_utils import _ExcludedModule, check_target_module_exists
from torch import nn

from moelora.config import MoeLoraConfig
from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules, inside
from moelora.inject.besides import head_names
from moelora.inject.blocks import is_feed_forward
from moelora.inject.moe_blocks import MoeBlock, exclusion, find_moe_blocks
from moelora.inject.reach import find_unreached
from moelora.inject.stacks import check_layers
from moelora.layers.modules import is_linear, unwrapped


def resolve_all_linear(model: nn.Module, config: MoeLoraConfig) -> None:
    """Replace "all-linear" in `config.target_modules` by names: every linear that can be adapted but the output head.

    Raises:
        TargetError: If the model has mixture-of-experts blocks and `exclude_modules` does not leave them out.
    """
    if not (isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear"):
        return
    modules = dict(base_modules(model))
    blocks = find_moe_blocks(modules)
    in_blocks = [part for block in blocks for part in block.parts]
    kept = _not_excluded(blocks, modules, config)
    if kept:
        raise TargetError(f"target_modules='all-linear' takes in {_moe_refusal(kept)}", anchor="moe-base")
    output = getattr(model, "get_output_embeddings", lambda: None)()
    heads = head_names(config)
    unreached = find_unreached(modules)
    names = {
        name
        for name, module in modules.items()
        if name
        and is_linear(module)
        and module is not output
        and not name.endswith(heads)
        and name not in unreached
        and inside(name, in_blocks) is None
    }
    endings = {name.rsplit(".", 1)[-1] for name in names}
    same = {name for name in modules if name.rsplit(".", 1)[-1] in endings}
    config.target_modules = endings if same == names else names


def find_target_blocks(model: nn.Module, modules: Mapping[str, nn.Module], config: MoeLoraConfig) -> list[str]:
    """Names of the mixture-of-experts blocks of the base model that the configuration targets.

    "all-linear" in `config.target_modules` is replaced by the names of all blocks.

    Args:
        model: The base model.
        modules: Its modules by name (`base_modules`).
        config: The configuration.

    Raises:
        TargetError: If the model has no such blocks, none is targeted, or their router does not tell its weights.
    """
    blocks = find_moe_blocks(modules)
    if not blocks or blocks[0].name == "":
        raise TargetError(
            f"{type(model).__name__} has no mixture-of-experts blocks of its own; allowed: a base that is a mixture of "
            "experts already (Mixtral, OLMoE, Qwen3-MoE, ...). For a dense model take another preset, 'mixlora' say."
        )
    if isinstance(config.target_modules, str) and config.target_modules.lower() == "all-linear":
        config.target_modules = {block.name for block in blocks}
    targeted = [block.name for block in blocks if check_target_module_exists(config, block.name)]
    if not targeted:
        raise TargetError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}, "
            f"layers_to_transform={config.layers_to_transform!r}) match none of the mixture-of-experts blocks "
            f"{', '.join(block.name for block in blocks[:8])}, ...; allowed: ends of these names, or a regex."
        )
    return targeted


def find_targets(model: nn.Module, modules: Mapping[str, nn.Module], config: MoeLoraConfig) -> list[str]:
    """Names of the linears that the configuration targets, in the order of the model.

    Args:
        model: The base model.
        modules: Its modules by name (`base_modules`).
        config: The configuration; "all-linear" is resolved.

    Raises:
        TargetError: If nothing matches, or a target cannot be adapted.
    """
    targeted = [name for name in modules if name and check_target_module_exists(config, name)]
    if not targeted:
        some = sorted({name.rsplit(".", 1)[-1] for name, module in modules.items() if name and is_linear(module)})
        raise TargetError(
            f"target_modules={config.target_modules!r} (exclude_modules={config.exclude_modules!r}, "
            f"layers_to_transform={config.layers_to_transform!r}) match no module of {type(model).__name__}; its "
            f"linears end in: {', '.join(some) or 'none'}.",
            anchor="no-module",
        )
    _check_moe_blocks(targeted, modules, config)
    unreached = find_unreached(modules)
    for name in targeted:
        if not is_linear(modules[name]):
            raise TargetError(
                f"target {name!r} is a {type(modules[name]).__name__}; allowed: linears (nn.Linear, Conv1D, quantised "
                "linears). Name its linears in target_modules, or train it whole with modules_to_save."
            )
        if name in unreached:
            raise TargetError(
                f"target {name!r} cannot be adapted: {unreached[name]}. Allowed: the other linears. Leave it out with "
                "exclude_modules, or use target_modules='all-linear', which does."
            )
    check_layers(targeted, config.layers_to_transform, config.layers_pattern)
    return targeted


def _not_excluded(blocks: list[MoeBlock], modules: Mapping[str, nn.Module], config: MoeLoraConfig) -> list[MoeBlock]:
    """The blocks of which `exclude_modules` does not leave out all linears, or experts that have no linears."""
    linears = [name for name, module in modules.items() if is_linear(module)]
    kept = []
    for block in blocks:
        held = [name for name in linears if inside(name, block.parts) is not None]
        stacked = not any(inside(name, [block.experts]) is not None for name in held)
        experts = [name for name in modules if stacked and inside(name, [block.experts]) is not None]
        if not all(_excludes(config, name) for name in held) or (
            stacked and not any(_excludes(config, name) for name in experts)
        ):
            kept.append(block)
    return kept


def _excludes(config: MoeLoraConfig, name: str) -> bool:
    return isinstance(check_target_module_exists(config, name), _ExcludedModule)


def _check_moe_blocks(targeted: list[str], modules: Mapping[str, nn.Module], config: MoeLoraConfig) -> None:
    """Refuse targets in or beside the model's own mixture-of-experts blocks, and names that only its experts have.

    A dense block of a model whose other feed-forward blocks are mixtures of experts may be targeted only if the latter
    are left out explicitly; else part of the model would silently stay unadapted.
    """
    blocks = find_moe_blocks(modules)
    for name in targeted:
        block = next((block for block in blocks if inside(name, block.parts) is not None), None)
        if block is not None:
            raise TargetError(f"target {name!r} is in {_moe_refusal([block])}", anchor="moe-base")
    kept = _not_excluded(blocks, modules, config)
    if not kept:
        return
    for name in targeted:
        parent = name.rpartition(".")[0]
        if is_feed_forward(unwrapped(modules[parent])):
            raise TargetError(
                f"target {name!r} is in a dense feed-forward block, but other feed-forward blocks that the targets "
                f"pass by are mixtures of experts: {_moe_refusal(kept)}",
                anchor="moe-base",
            )
    if isinstance(config.target_modules, str):
        return
    for ending in sorted(config.target_modules):
        if not any(name == ending or name.endswith(f".{ending}") for name in modules):
            message = f"target_modules: {ending!r} match no module, but the model has {_moe_refusal(kept)}"
            raise TargetError(message, anchor="moe-base")


def _moe_refusal(blocks: list[MoeBlock]) -> str:
    first = blocks[0]
    more = f" and {len(blocks) - 1} more" if len(blocks) > 1 else ""
    return (
        f"the mixture-of-experts block {first.name!r}{more} (experts: {first.experts!r}), which cannot be adapted yet; "
        f"allowed: linears outside such blocks, as those of attention. Leave the blocks out with "
        f"exclude_modules={exclusion(blocks)!r}, and choose a preset with a mixture on each linear (most have) "
        "if nothing but attention is left."
    )
