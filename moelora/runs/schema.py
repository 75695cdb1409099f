"""From a mapping read from YAML to a dataclass, checked key by key and value by value."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any, TypeVar

from moelora.errors import RunError
from moelora.validation import check_keys, fits, options_of, type_name

Section = TypeVar("Section")


def build(kind: type[Section], given: Any, where: str) -> Section:
    """Make a section's dataclass of what the YAML says.

    Args:
        kind: One of the dataclasses of this module.
        given: The mapping read from YAML.
        where: Name of the section for messages.

    Raises:
        MoeLoraError: If a key is unknown or missing, or a value has the wrong type.
    """
    if not isinstance(given, dict):
        raise RunError(f"{where} is {given!r}; it must be a mapping of keys to values.")
    fields = {f.name: f for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    check_keys(where, given, fields)
    hints = typing.get_type_hints(kind)
    missing = [
        name
        for name, f in fields.items()
        if f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING and name not in given
    ]
    if missing:
        raise RunError(f"{where} lacks {', '.join(map(repr, missing))}. Allowed keys: {', '.join(sorted(fields))}.")
    prefix = "" if where == "the configuration" else f"{where}."
    return kind(**{name: _value(hints[name], value, f"{prefix}{name}") for name, value in given.items()})


def _value(hint: Any, value: Any, where: str) -> Any:
    """`value` if it fits the type `hint`, with sections built and whole numbers taken for floats."""
    options = options_of(hint)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build(option, value, where)  # type: ignore[arg-type]
        if fits(option, value):
            return float(value) if option is float else value
    raise RunError(f"{where} is {value!r}; allowed: {' or '.join(map(type_name, options))}.")
