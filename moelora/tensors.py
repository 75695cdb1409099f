"""The tensors that choices declare, as a module."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelora.choices import Param


class AdapterTensors(nn.Module):
    """Parameters as declared by `Param`s, one attribute each.

    What is not trained is a parameter without gradient rather than a buffer: tools that copy an adapter (TRL makes a
    reference of it) copy parameters only. Experts are stacked in one tensor, so that each is in the graph at every
    step: an expert that got no token has a zero gradient rather than none, which data-parallel wrappers need. It is a
    module, not an entry of a `ParameterDict`, since hot-swapping and TRL look for the adapter's name between dots.

    Args:
        params: What to allocate, by the last part of its name.
        elsewhere: What holds further tensors, by the last parts of their names: those that another site shares.
    """

    def __init__(self, params: Iterable[Param], elsewhere: Mapping[str, AdapterTensors] | None = None) -> None:
        super().__init__()
        self.elsewhere = dict(elsewhere or {})  # in a dict, hence no submodules
        self.pieces: dict[str, list[str]] = {}
        self.declared: dict[str, Param] = {}
        for param in params:
            stored = {piece.name.rpartition(".")[2]: piece for piece in param.stored()}
            self.pieces[param.name.rpartition(".")[2]] = list(stored)
            self.declared |= stored
        for name, param in self.declared.items():
            tensor = nn.Parameter(torch.empty(param.shape, dtype=param.dtype), requires_grad=param.trainable)
            self.register_parameter(name, tensor)
            param.init.fill(tensor.data)

    def tensor(self, name: str) -> Tensor:
        """A tensor as it was declared: what is frozen of it and the rest in one."""
        if name in self.elsewhere:
            return self.elsewhere[name].tensor(name)
        pieces = self.pieces[name]
        first: Any = self._parameters[pieces[0]]
        if len(pieces) == 1:
            return first
        return torch.cat([first, self.get_parameter(pieces[1])])

    def has(self, name: str) -> bool:
        """Whether a tensor of that name was declared."""
        return name in self.pieces or name in self.elsewhere

    def tensors(self) -> dict[str, Tensor]:
        """All tensors by name."""
        return {name: self.tensor(name) for name in (*self.pieces, *self.elsewhere)}

    def freeze_untrained(self) -> None:
        """Take the gradient from what is declared as not trained; PEFT asks for gradients by adapter, not by tensor."""
        for name, param in self.declared.items():
            tensor = self.get_parameter(name)
            if not param.trainable and tensor.requires_grad:
                tensor.requires_grad_(False)

    def is_trained(self) -> bool:
        """Whether any of the tensors that are declared as trained asks for a gradient now."""
        return any(self.get_parameter(name).requires_grad for name, param in self.declared.items() if param.trainable)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> AdapterTensors:
        # A cast of the model to half precision must not reach a tensor that states its dtype: steps of 1e-5 on a bias
        # would be rounded away. Its old values are taken, not those that have been rounded.
        kept = {name: self.get_parameter(name).data for name, param in self.declared.items() if param.dtype is not None}
        super()._apply(fn, recurse)
        for name, before in kept.items():
            tensor = self.get_parameter(name)
            if tensor.dtype != before.dtype:
                tensor.data = before.to(tensor.device)
        return self

    def extra_repr(self) -> str:
        """Names and shapes."""
        return ", ".join(f"{name}={list(self.get_parameter(name).shape)}" for name in self.declared)
