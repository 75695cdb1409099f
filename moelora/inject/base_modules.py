"""The modules of a base model under their own names, whatever adapters sit on it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

from moelora.layers.modules import unwrapped


def base_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules of the base model under their own names.

    A wrapped module comes once, as its outermost tuner layer; the adapters' own modules do not come.
    """
    yield from _walk(model, "")


def _walk(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    yield name, module
    if isinstance(module, AuxiliaryTrainingWrapper):
        return
    for child_name, child in unwrapped(module).named_children():
        yield from _walk(child, join(name, child_name))


def join(name: str, child: str) -> str:
    """Name of a child of the module `name`, which is "" for the model itself."""
    return f"{name}.{child}" if name else child


def inside(name: str, parts: Iterable[str]) -> str | None:
    """The first of `parts` that is the module `name` or contains it, or None."""
    return next((part for part in parts if part in ("", name) or name.startswith(f"{part}.")), None)
