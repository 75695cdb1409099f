"""What a base model was when an adapter was saved on it, so that another one is told apart.

A fingerprint holds samples of a few frozen weights. They are compared in bfloat16, which float32 and bfloat16 copies of
a model share; quantised weights are left out, so that a base may be quantised before or after.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.inject.base_modules import base_modules, join
from moelora.layers.modules import unwrapped

# Rows are taken from the first ones: a vocabulary that grew at its end is still the same.
_ROWS = slice(0, 512, 16)
_COLUMNS = 32
_VALUES = 16
# Relative distance of the samples: below the first it is rounding (float16 has fewer exponents), above the second
# another model. Two models with independent weights are about 1.4 apart, a model and its fine-tuned copy below 0.2.
_ROUNDING, _ANOTHER = 0.01, 0.5


def fingerprint(model: nn.Module) -> dict[str, Any] | None:
    """What tells a base model from others.

    Args:
        model: The base model, with or without adapters.

    Returns:
        Plain values: `architecture`, `quantization`, `revision` where the model knows it, and by the names of a few
        weights their `columns`, a `digest` and some `values`. None where no weight can be read (all are on the meta
        device or split over processes).
    """
    base = _base(model)
    tensors = _sampled(base)
    if not tensors:
        return None
    return {
        "architecture": _architecture(base),
        "quantization": _quantization(base),
        "revision": getattr(getattr(base, "config", None), "_commit_hash", None),
        "weights": {name: _described(weight) for name, weight in tensors.items()},
    }


def check_base(model: nn.Module, stored: Mapping[str, Any] | None, name: str | None) -> None:
    """Compare a base model with the one that an adapter was saved on; a warning tells of what differs a little.

    Args:
        model: The base model, with or without adapters.
        stored: The adapter's fingerprint; None, as in older adapters, compares nothing.
        name: What the adapter calls its base model, for messages.

    Raises:
        TargetError: If it is another model, or the fingerprint is not as it was saved.
    """
    if stored is None:
        return
    base = _base(model)
    try:
        weights = {
            key: (each["columns"], each["digest"], list(each["values"])) for key, each in stored["weights"].items()
        }
        architecture, quantization = stored["architecture"], stored["quantization"]
    except (KeyError, TypeError, AttributeError) as error:
        raise TargetError(
            f"base_fingerprint of the adapter's configuration is {str(stored)[:200]}; allowed: what saving wrote "
            "there, or null to compare nothing."
        ) from error
    now = _weights(base)
    faults, differing = [], []
    if architecture != _architecture(base):
        faults.append(f"it is a {_architecture(base)!r} and not a {architecture!r}")
    for key, (columns, digest, values) in weights.items():
        weight = now.get(key)
        if weight is None or not _is_readable(weight):
            continue
        found = _described(weight)
        if found["columns"] != columns:
            faults.append(f"{key} has {found['columns']} columns and not {columns!r}")
        elif found["digest"] != digest:
            distance = _distance(values, found["values"])
            if distance > _ANOTHER:
                faults.append(f"the values of {key} are others")
            elif distance > _ROUNDING or weight.dtype != torch.float16:
                differing.append(key)
    called = f", {name!r}" if name else ""
    if faults:
        raise TargetError(
            f"the base model is not the one that the adapter was saved on{called}: {'; '.join(faults[:3])}. Allowed: "
            "that model. To use the adapter on this one all the same, set base_fingerprint to null in its "
            "adapter_config.json."
        )
    if differing:
        warnings.warn(
            f"the base model differs a little from the one that the adapter was saved on{called}: "
            f"{', '.join(differing)}. It is another revision or a fine-tuned copy, and changes the adapter's outputs.",
            stacklevel=2,
        )
    if quantization != _quantization(base):
        warnings.warn(
            f"the adapter was saved on a base model with quantization {quantization!r}, and this one has "
            f"{_quantization(base)!r}. The adapter's outputs change with it.",
            stacklevel=2,
        )


def _base(model: Any) -> nn.Module:
    found: nn.Module = model.get_base_model() if hasattr(model, "get_base_model") else model
    return found


def _architecture(base: nn.Module) -> str:
    return str(getattr(getattr(base, "config", None), "model_type", None) or type(base).__name__)


def _quantization(base: nn.Module) -> str:
    """The method and its kind, as "bitsandbytes nf4"; "none" for a base that is not quantised."""
    config = getattr(getattr(base, "config", None), "quantization_config", None)
    if config is None:
        return "none"
    words = config if isinstance(config, Mapping) else config.to_dict()
    method = words.get("quant_method")
    parts = [str(getattr(method, "value", method))]
    if words.get("load_in_4bit"):
        parts += [
            str(words.get("bnb_4bit_quant_type")),
            *(["double"] if words.get("bnb_4bit_use_double_quant") else []),
        ]
    elif words.get("load_in_8bit"):
        parts.append("int8")
    elif words.get("bits") is not None:
        parts.append(f"{words['bits']} bits")
    return " ".join(parts)


def _weights(base: nn.Module) -> dict[str, Tensor]:
    """The matrices of the base model under their own names, without those of modules that an adapter brings whole.

    Such a module, a classifier's head say, may start at random each time that the base is loaded.
    """
    found: dict[str, Tensor] = {}
    for name, module in base_modules(base):
        if isinstance(module, ModulesToSaveWrapper):
            continue
        inner = module.original_module if isinstance(module, AuxiliaryTrainingWrapper) else unwrapped(module)
        for own, parameter in inner.named_parameters(recurse=False):
            if parameter.dim() == 2:
                found[join(name, own)] = parameter.detach()
    return found


def _sampled(base: nn.Module) -> dict[str, Tensor]:
    """The first, the middle and the last matrix that can be read."""
    readable = [(name, weight) for name, weight in _weights(base).items() if _is_readable(weight)]
    chosen = sorted({0, len(readable) // 2, len(readable) - 1}) if readable else []
    return dict(readable[index] for index in chosen)


def _is_readable(weight: Tensor) -> bool:
    """Whether its values are here, whole, and numbers of the model itself."""
    plain = type(weight) in (Tensor, nn.Parameter)
    return plain and weight.is_floating_point() and weight.itemsize > 1 and not weight.is_meta and weight.numel() > 0


def _described(weight: Tensor) -> dict[str, Any]:
    columns = weight.shape[1]
    sample = weight[_ROWS, :: max(1, columns // _COLUMNS)].to(torch.bfloat16).float().cpu().flatten()
    few = sample[:: max(1, len(sample) // _VALUES)][:_VALUES]
    return {
        "columns": columns,
        "digest": hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16],
        "values": [float(f"{value:.4g}") for value in few.tolist()],
    }


def _distance(before: list[float], now: list[float]) -> float:
    a, b = torch.tensor(before, dtype=torch.float64), torch.tensor(now, dtype=torch.float64)
    if a.shape != b.shape:
        return float("inf")
    return float((a - b).norm() / a.norm().clamp(min=1e-12))
