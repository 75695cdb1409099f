"""Whether the methods are of equal size, as a comparison has to be."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from eval.compare.schema import BenchmarkConfig
from moelora.errors import RunError
from moelora.runs.models import ModelSource, load_skeleton
from moelora.runs.parameters import TOLERANCE, ParameterCount, count_parameters, is_equal_size, router_weights


def source_of(config: BenchmarkConfig) -> ModelSource:
    """The base model of a comparison."""
    return ModelSource(config.model, config.dtype, config.model_kwargs)


def check_sizes(config: BenchmarkConfig) -> dict[str, ParameterCount]:
    """The sizes of all methods.

    Raises:
        RunError: If a method's trainable parameters are not within 2 % of the reference's trainable parameters, or of
            its active ones where the method says so.
    """
    sizes: dict[str, ParameterCount] = {}
    frozen: dict[str, int] = {}
    for key, method in sorted(config.methods.items(), key=lambda item: item[1].regime.made_of is not None):
        if method.regime.made_of is not None:
            sizes[key] = sizes[method.regime.made_of]
            continue
        skeleton = load_skeleton(source_of(config))
        one = count_parameters(skeleton, method.peft_config())
        sizes[key] = replace(one, trainable=method.regime.size(one.trainable, len(config.data.tasks)))
        if method.equal == "with_router":
            still = sum(tensor.numel() for _, tensor in router_weights(skeleton) if not tensor.requires_grad)
            frozen[key] = method.regime.size(still, len(config.data.tasks))
    reference = sizes[config.reference]
    wrong = []
    for key, method in config.methods.items():
        wanted = reference.active if method.equal == "active" else reference.trainable
        found = sizes[key].trainable + frozen.get(key, 0)
        if not is_equal_size(found, wanted):
            wrong.append(
                f"{key} has {found:,} ({found / wanted - 1:+.1%} of {wanted:,}{_advice(method, found, wanted)})"
            )
    if wrong:
        raise RunError(
            f"the methods are not of equal size: {'; '.join(wrong)}. Allowed: {TOLERANCE:.0%} from the "
            f"trainable parameters of {config.reference} ({reference.trainable:,}), or with `equal: active` from "
            f"its active ones ({reference.active:,}). Change ranks or numbers of experts."
        )
    return sizes


def _advice(method: Any, found: int, wanted: int) -> str:
    """The rank that would fit a plain LoRA, whose parameters are proportional to it."""
    words = method.adapter or {}
    r = words.get("r")
    if words.get("peft") != "lora" or not isinstance(r, int):
        return ""
    return f"; nearest r: {max(1, round(r * wanted / found))}"
