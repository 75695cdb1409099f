"""Published methods as named points on the axes of `MoeLoraConfig`, one file per paper; each registers itself.

A preset is a function of keyword words that returns a configuration; it is never a code path of its own. Every preset
takes PEFT's words as well (`target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
`modules_to_save`, `bias`, `task_type`, ...), `compute`, how it is computed, and `balance_scope`. A load-balancing
loss is 1.0 at perfect balance, the mean over the layers, unless its docstring says otherwise; coefficients are in that
convention.
"""

from __future__ import annotations

from moelora.choices import discover
from moelora.config import MoeLoraConfig
from moelora.preset_registry import available, find, own_words

discover(__name__, __path__)
# a preset's file has its name, and the package shows the function by it
globals().update({name: find(name) for name in available()})


def words(name: str) -> list[str]:
    """The keyword words that a preset takes, its own first.

    Raises:
        ConfigError: If there is no such preset.
    """
    return [*own_words(name), *MoeLoraConfig.peft_words()]


__all__ = [*available(), "available", "words"]  # noqa: PLE0604 - the names are strings
