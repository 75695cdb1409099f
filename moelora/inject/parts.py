"""Which part a linear plays in its layer."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from moelora.errors import TargetError
from moelora.inject.blocks import find_form, looks_like_feed_forward
from moelora.inject.split_blocks import SplitBlock, check_split_block, find_split_blocks
from moelora.layers.modules import linear_size, unwrapped

_OF_BLOCK = ("gate", "up", "down")
_QUERY = re.compile(r"(q|query)(_proj|_lin)?")
_CROSS = re.compile(r"cross|encdec|encoder_attn", re.IGNORECASE)
_OF_ATTENTION = {"key": re.compile(r"(k|key)(_proj|_lin)?"), "value": re.compile(r"(v|value)(_proj|_lin)?")}
_FUSED = re.compile(r"(w_?)?qkv(_proj|_lin)?|query_key_value|c_attn|in_proj", re.IGNORECASE)


def part_of(
    modules: Mapping[str, nn.Module], splits: Mapping[str, SplitBlock], name: str, wanted: Iterable[str]
) -> str | None:
    """The part of a linear, one of `wanted`, or None.

    Args:
        modules: The modules of the base model by name.
        splits: Its split blocks (`find_split_blocks`).
        name: The linear.
        wanted: "key", "value", "gate", "up", "down".

    Raises:
        TargetError: If keys or values are wanted, and the linear computes them together with queries; or if its
            feed-forward block fits no known form.
    """
    parent, _, last = name.rpartition(".")
    of_attention = [part for part in wanted if part in _OF_ATTENTION]
    for part in of_attention:
        if _OF_ATTENTION[part].fullmatch(last):
            return part
    if of_attention and _FUSED.fullmatch(last):
        raise TargetError(
            f"target {name!r} computes queries, keys and values in one linear, so that the keys and values are no "
            f"outputs of their own; allowed: separate projections. Leave it out with exclude_modules={[last]!r}: the "
            "other parts are adapted then."
        )
    of_block = [part for part in wanted if part in _OF_BLOCK]
    if not of_block or not parent:
        return None
    if name in splits:
        check_split_block(modules, splits[name])
        linears = splits[name].linears
    else:
        block = unwrapped(modules[parent])
        if not looks_like_feed_forward(block):
            return None
        linears = {role: f"{parent}.{child}" for role, child in find_form(block, parent).linears.items()}
    return next((role for role in of_block if linears.get(role) == name), None)


def inputs_of(modules: Mapping[str, nn.Module], names: Iterable[str]) -> dict[str, str]:
    """A key for each linear that may have the input of others: the same for all of them.

    They are the projections to queries, keys and values of one attention (in cross-attention keys and values) that have
    as many features, known by their names, and gate and up of one feed-forward block, known by its structure.

    Args:
        modules: The modules of the base model by name.
        names: The linears.
    """
    found, splits = {}, find_split_blocks(modules)
    for name in names:
        parent, _, last = name.rpartition(".")
        parts = [*_OF_ATTENTION.values(), *([] if _CROSS.search(parent) else [_QUERY])]
        if any(part.fullmatch(last) for part in parts):
            found[name] = f"{parent} {linear_size(modules[name])[0]}"
        elif parent and name not in splits and looks_like_feed_forward(block := unwrapped(modules[parent])):
            form = find_form(block, parent)
            if last in (form.gate, form.up):
                found[name] = parent
    return found


def features_of(model: nn.Module) -> tuple[int, int]:
    """Features of a model's hidden states and of one attention head, by its configuration; 0 where it does not say."""
    config: Any = getattr(unwrapped(model), "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    own = getattr(config, "head_dim", None)
    hidden, heads = getattr(config, "hidden_size", None), getattr(config, "num_attention_heads", None)
    hidden = hidden if isinstance(hidden, int) else 0
    if isinstance(own, int):
        return hidden, own
    return hidden, hidden // heads if isinstance(heads, int) else 0


def is_causal(modules: Mapping[str, nn.Module], name: str) -> bool | None:
    """Whether a module is in a layer whose attention looks back only, by what the layer says of itself; else None.

    Args:
        modules: The modules of the base model by name.
        name: The module.
    """
    while name:
        name = name.rpartition(".")[0]
        inner = (unwrapped(module) for key, module in modules.items() if key.startswith(f"{name}."))
        said = [vars(module)[word] for module in inner for word in ("is_causal", "is_decoder") if word in vars(module)]
        if said:
            return any(said)
    return None
