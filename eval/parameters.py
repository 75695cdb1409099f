"""How many parameters an adapter trains, and how many of them work on a token."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ParameterCount:
    """Sizes of an adapter.

    Args:
        trainable: Parameters that training moves.
        active: Parameters of the adapter that one token passes through, routers included, frozen ones too.
        base: Parameters of the frozen model.
    """

    trainable: int
    active: int
    base: int

    def to_json(self) -> dict[str, int]:
        """As a mapping."""
        return dataclasses.asdict(self)


def count_parameters(skeleton: Any, adapter: Any | None) -> ParameterCount:
    """The sizes of an adapter on a model.

    Args:
        skeleton: The base model without weights (on the meta device); it is changed.
        adapter: A `PeftConfig`; None for the base model alone.
    """
    base = sum(parameter.numel() for parameter in skeleton.parameters())
    if adapter is None:
        return ParameterCount(trainable=0, active=0, base=base)
    from peft import get_peft_model

    before = {id(parameter) for parameter in skeleton.parameters()}
    # PEFT warns where an adapter's base has another path than here, which the skeleton cannot help.
    fresh = dataclasses.replace(adapter, inference_mode=False, base_model_name_or_path=None)
    model = get_peft_model(skeleton, fresh)
    added = [(name, parameter) for name, parameter in model.named_parameters() if id(parameter) not in before]
    trainable = int(model.get_nb_trainable_parameters()[0])
    return ParameterCount(trainable, sum(_active(name, parameter, adapter) for name, parameter in added), base)


def _active(name: str, parameter: Any, adapter: Any) -> int:
    """What a token uses of a parameter: of stacked experts the chosen ones, of everything else all."""
    routing = getattr(adapter, "routing", None)
    stacked = "moelora_" in name and "moelora_router" not in name and parameter.ndim == 3
    if routing is None or not stacked or routing.top_k is None:
        return int(parameter.numel())
    experts = parameter.shape[0]
    return int(parameter.numel() // experts * min(routing.top_k, experts))
