"""Changes to a model's modules that undo themselves when they fail."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from moelora.layers.base import MoeLoraLayer
from moelora.peft_type import PREFIX
from moelora.routing.run import own_hooks

_CONTAINERS = (dict, OrderedDict, list, set)


class Snapshot:
    """How the modules of a model are put together: children, parameters, hooks, attributes, what is trained.

    Values of tensors are not kept: what changes them is checked before it does. Of the adapters that are there it is
    only noted which there are and what of them is trained, since a model may have very many.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        modules: list[Any] = _modules_around_adapters(model)
        hooks = [own_hooks(module) for module in modules]
        self._owners = [_Attributes(owner) for owner in (*modules, *(each for each in hooks if each is not None))]
        self._trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]

    def restore(self) -> None:
        """Put everything back."""
        for owner in self._owners:
            owner.restore()
        for parameter, trained in self._trained:
            if parameter.requires_grad != trained:
                parameter.requires_grad = trained


def _modules_around_adapters(model: nn.Module) -> list[nn.Module]:
    """The modules of a model, with the containers of adapters and without what is in them."""
    found: dict[nn.Module, None] = {}
    left = [model]
    while left:
        module = left.pop()
        if module in found:
            continue
        found[module] = None
        for name, child in module.named_children():
            if isinstance(module, MoeLoraLayer) and name.startswith(PREFIX):
                found[child] = None
            else:
                left.append(child)
    return list(found)


class _Attributes:
    """The attributes of an object, and what is in those that are containers."""

    def __init__(self, owner: Any) -> None:
        self._owner = owner
        self._values = dict(vars(owner))
        self._contents = [(value, value.copy()) for value in self._values.values() if type(value) in _CONTAINERS]

    def restore(self) -> None:
        vars(self._owner).clear()
        vars(self._owner).update(self._values)
        # in place: handles of hooks know these very containers
        for container, content in self._contents:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(content)


@contextmanager
def undone_on_error(model: nn.Module) -> Iterator[None]:
    """Put a model's modules back as they were if the block ends in an error of any kind.

    Args:
        model: The model.
    """
    before = Snapshot(model)
    try:
        yield
    except BaseException:
        before.restore()
        raise
