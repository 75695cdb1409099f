"""How many parameters an adapter trains, and how many of them work on a token."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

# How far the sizes of two adapters may be apart and still be called equal.
TOLERANCE = 0.02
# In the names of a router's tensors.
ROUTER = "moelora_router"


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


def is_equal_size(found: int, wanted: int) -> bool:
    """Whether two numbers of parameters are called equal."""
    return abs(found - wanted) <= TOLERANCE * wanted


def router_weights(model: Any) -> Iterator[tuple[str, Any]]:
    """The weights of a model's routers by name, trained ones and frozen ones.

    Router biases are left out.
    """
    for name, tensor in model.named_parameters():
        if ROUTER in name and name.endswith("weight"):
            yield name, tensor


def count_parameters(skeleton: Any, adapter: Any | None) -> ParameterCount:
    """The sizes of an adapter on a model.

    Args:
        skeleton: The base model without weights (on the meta device); it is changed.
        adapter: A `PeftConfig`; None for the base model alone.
    """
    from peft import get_peft_model

    base = sum(parameter.numel() for parameter in skeleton.parameters())
    if adapter is None:
        return ParameterCount(trainable=0, active=0, base=base)
    before = {id(parameter) for parameter in skeleton.parameters()}
    # PEFT warns where an adapter's base has another path than here, which the skeleton cannot help.
    fresh = dataclasses.replace(adapter, inference_mode=False, base_model_name_or_path=None)
    model = get_peft_model(skeleton, fresh)
    added = {name: tensor for name, tensor in model.named_parameters() if id(tensor) not in before}
    trainable = int(model.get_nb_trainable_parameters()[0])
    return ParameterCount(trainable, sum(_active(name, tensor, adapter) for name, tensor in added.items()), base)


def _active(name: str, tensor: Any, adapter: Any) -> int:
    """What a token uses of a tensor: of stacked experts the chosen ones, of everything else all."""
    selection = getattr(adapter, "selection", None)
    if selection is None or "moelora_" not in name or ROUTER in name or tensor.ndim != 3:
        return int(tensor.numel())
    experts = tensor.shape[0]
    return int(tensor.numel() // experts * selection.experts_per_token(experts))
