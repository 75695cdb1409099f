"""Adapters of earlier format versions, in today's words.

Version 1 had five flat axes in adapter_config.json, and a container for each factor of each linear of a feed-forward
block in the weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from moelora.errors import ConfigError, MoeLoraError
from moelora.validation import check_keys

_T = TypeVar("_T")

# Before the last part there may be the name of the adapter.
_BLOCK_KEY = re.compile(r"\.moelora_(gate|up|down)_(A|B)((?:\.[^.]+)?)\.weight$")


def upgrade_config(words: Mapping[str, Any], version: int) -> dict[str, Any]:
    """The fields of an adapter_config.json as today's `MoeLoraConfig` takes them.

    Args:
        words: The fields as they were written.
        version: The file's format version.

    Raises:
        ConfigError: If a part that shapes the adapter is missing.
    """
    words = dict(words)
    parts = ("experts", "placement", "routing", "balance") if version == 1 else _PARTS_NOW
    missing = [part for part in parts if part not in words]
    if missing:
        raise ConfigError(
            f"the adapter's configuration (format version {version}) lacks {', '.join(missing)}; allowed: all of "
            f"{', '.join(parts)}. The file is not as it was saved."
        )
    if version > 1:
        return words
    try:
        return _from_version_1(words)
    except (TypeError, AttributeError) as error:
        raise ConfigError(f"the adapter's configuration (format version 1) is not as it was saved: {error}.") from error


_PARTS_NOW = ("experts", "placement", "scores", "selection", "balance")
_SELECTION_FIELDS = ("renormalize", "expert_dropout", "capacity_factor", "capacity_in_eval")
_FIELDS_1 = {
    "experts": ("num_experts", "r", "lora_alpha", "lora_dropout", "use_rslora", "init", "init_std"),
    "placement": ("feed_forward", "unrouted_modules"),
    "routing": ("score", "top_k", "trainable", "init_std", "bias_update_rate", *_SELECTION_FIELDS),
    "balance": ("loss", "coef", "z_loss_coef", "scope"),
    "compute": ("implementation",),
}


def _check_version_1(words: Mapping[str, Any]) -> None:
    """Refuse parts that are not as version 1 saved them: each with all its fields and no other."""
    for part, fields in _FIELDS_1.items():
        given = words.get(part)
        if given is None and part == "compute":
            continue
        if not isinstance(given, Mapping) or (lacking := [field for field in fields if field not in given]):
            found = f"lacks {', '.join(lacking)}" if isinstance(given, Mapping) else f"is {given!r}"
            raise ConfigError(
                f"{part} of the adapter's configuration (format version 1) {found}; allowed: a value for each of "
                f"{', '.join(fields)}. The file is not as it was saved."
            )
        check_keys(f"{part} (format version 1)", given, fields)


def _from_version_1(words: dict[str, Any]) -> dict[str, Any]:
    _check_version_1(words)
    routing, balance = words.pop("routing"), words["balance"]
    placement, compute = words["placement"], words.get("compute") or {}
    moves_bias = routing["bias_update_rate"] != 0
    words["experts"] = {"kind": "lora", **words["experts"]}
    words["placement"] = {
        "kind": "feed_forward" if placement["feed_forward"] else "linear",
        "unrouted_modules": placement["unrouted_modules"],
    }
    words["scores"] = {
        "kind": "linear",
        "activation": routing["score"],
        "trainable": routing["trainable"],
        "init_std": routing["init_std"],
        "bias": moves_bias,
    }
    if routing["top_k"] is None and routing["expert_dropout"] == 0:
        words["selection"] = {"kind": "dense", "renormalize": routing["renormalize"]}
    else:
        # dense selection has no expert dropout any more; the top E of E experts are the same
        k = words["experts"]["num_experts"] if routing["top_k"] is None else routing["top_k"]
        words["selection"] = {"kind": "top_k", "k": k, **{key: routing[key] for key in _SELECTION_FIELDS}}
    losses = [{"kind": balance["loss"], "coef": balance["coef"]}, {"kind": "z", "coef": balance["z_loss_coef"]}]
    words["balance"] = [
        *([{"kind": "bias_update", "coef": routing["bias_update_rate"]}] if moves_bias else []),
        *(losses if any(loss["coef"] > 0 for loss in losses) else []),
    ]
    words["balance_scope"] = balance["scope"]
    words["compute"] = {"kind": compute.get("implementation", "fast")}
    return words


def upgrade_keys(weights: Mapping[str, _T]) -> dict[str, _T]:
    """An adapter's tensors under today's names; a no-op for those that have them.

    Args:
        weights: Tensors by the names of adapter_model.safetensors, or by those in a model.
    """
    return {_BLOCK_KEY.sub(r".moelora_\2\3.\1", key): tensor for key, tensor in weights.items()}


def check_finite(weights: Mapping[str, Tensor], where: str, error: type[MoeLoraError]) -> None:
    """Refuse tensors of an adapter with values that are no numbers; every reader of adapters' files asks this.

    Args:
        weights: Tensors by their names in the file.
        where: What holds them, for the message.
        error: The class to raise.

    Raises:
        MoeLoraError: Of the class `error`, with the first such tensor.
    """
    for name, tensor in weights.items():
        if not bool(tensor.isfinite().all()):
            raise error(
                f"{where} holds NaN or infinity in {name}; allowed: finite numbers. Save it from a checkpoint of "
                "before the training went wrong, or train it again."
            )
