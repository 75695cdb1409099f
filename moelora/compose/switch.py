"""Switch experts of a loaded adapter off and on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from moelora.errors import ComposeError
from moelora.layers.base import MoeLoraLayer


def switch_experts(model: nn.Module, experts: Mapping[str | int, bool], adapter: str | None = None) -> list[str | int]:
    """Switch experts of an adapter off (False) or on (True), for every forward from now on.

    The router then selects as if the experts that are off were not there: their scores do not reach the selection, a
    softmax is over the others, and with fewer experts than choices a token gets all of them. With all experts off every
    mixture gives the base's output; plain LoRAs beside the mixtures, which no router knows, stay as they are. Weights
    are not touched and nothing of it is saved: switching on again gives the bits of before.

    The setting belongs to the model, not to a thread. Each layer's router takes it over at once, but a forward that is
    running in another thread meanwhile may see it from some layer on.

    Args:
        model: A model with the adapter.
        experts: What to set, by name (or number) of the expert; the others stay as they are.
        adapter: Name of the adapter; None is the active one.

    Returns:
        The experts that are on now, by name if they have names.

    Raises:
        ComposeError: If the model has no such adapter with a router, or several are active and none is named, or the
            adapter has no such expert, or its experts cannot be switched one by one (a tree of residuals).
    """
    if adapter is None:
        adapter = _active(model)
    if not isinstance(experts, Mapping) or not all(isinstance(is_on, bool) for is_on in experts.values()):
        raise ComposeError(
            f"the experts are {experts!r}; allowed: a dict of True (on) or False (off) by name or number."
        )
    layers = [layer for layer in model.modules() if isinstance(layer, MoeLoraLayer) and adapter in layer.routers]
    if not layers:
        routed = {name for each in model.modules() if isinstance(each, MoeLoraLayer) for name in each.routers}
        allowed = ", ".join(sorted(routed)) or "a model with a mixture"
        raise ComposeError(f"the model has no mixture of an adapter {adapter!r}; allowed: {allowed}.")
    config = layers[0].configs[adapter]
    if config.selection.needs_all:
        raise ComposeError(
            f"the selection of adapter {adapter!r} is {config.selection.kind!r}; allowed: one whose experts do not "
            "depend on each other. Here an expert is an edge of a tree, which leads to others."
        )
    choice = config.experts
    names = list(getattr(choice, "names", []))
    E = choice.fewest  # what every layer has
    if choice.num_experts > E:
        raise ComposeError(
            f"the mixtures of adapter {adapter!r} have from {E} to {choice.num_experts} experts, by layer; allowed: "
            "the same number everywhere. Experts are switched by their number in every layer at once."
        )
    known_numbers = {expert: number for number, expert in enumerate([*names] or range(E))}
    known_numbers |= {number: number for number in range(E)}
    unknown = [expert for expert in experts if expert not in known_numbers or isinstance(expert, bool)]
    if unknown:
        allowed = f"{', '.join(names)}, or 0 to {E - 1}" if names else f"0 to {E - 1}"
        raise ComposeError(f"there is no expert {unknown[0]!r} in adapter {adapter!r}; allowed: {allowed}.")
    before = layers[0].routers[adapter].on
    on = set(range(E) if before is None else before)
    for expert, is_on in experts.items():
        (on.add if is_on else on.discard)(known_numbers[expert])
    for router in {layer.routers[adapter] for layer in layers}:
        router.on = None if len(on) == E else tuple(sorted(on))
    return [names[e] if names else e for e in sorted(on)]


def _active(model: nn.Module) -> str:
    """The one active adapter with a router."""
    layers = [layer for layer in model.modules() if isinstance(layer, MoeLoraLayer)]
    active = sorted({name for layer in layers for name in layer.active_adapters if name in layer.routers})
    if len(active) != 1:
        found = ", ".join(active) or "none"
        raise ComposeError(
            f"the active adapters with a mixture are: {found}; allowed: a model with a mixture of one active adapter, "
            "or its name as `adapter`."
        )
    return active[0]
