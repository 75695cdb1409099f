"""From a mapping read from YAML to a dataclass, checked key by key and value by value."""

from __future__ import annotations

import dataclasses
import types
import typing
from typing import Any, Literal, TypeVar

from moelora.errors import RunError
from moelora.validation import check_keys

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
    options = typing.get_args(hint) if isinstance(hint, types.UnionType) or _is_union(hint) else (hint,)
    for option in options:
        if dataclasses.is_dataclass(option) and isinstance(value, dict):
            return build(option, value, where)  # type: ignore[arg-type]
        if _fits(option, value):
            return float(value) if option is float else value
    raise RunError(f"{where} is {value!r}; allowed: {' or '.join(_name(option) for option in options)}.")


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) is typing.Union


def _fits(option: Any, value: Any) -> bool:
    origin = typing.get_origin(option)
    if origin is Literal:
        return value in typing.get_args(option)
    if origin is list:
        return isinstance(value, list) and all(_fits(typing.get_args(option)[0], item) for item in value)
    if origin is dict:
        item = typing.get_args(option)[1]
        return isinstance(value, dict) and all(isinstance(k, str) and _fits(item, v) for k, v in value.items())
    if option is Any:
        return True
    if option is type(None):
        return value is None
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, (int, float) if option is float else option)


def _name(option: Any) -> str:
    if typing.get_origin(option) is Literal:
        return " or ".join(map(repr, typing.get_args(option)))
    if option is type(None):
        return "null"
    if dataclasses.is_dataclass(option) or typing.get_origin(option) is dict:
        return "a mapping"
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
    return words.get(getattr(option, "__name__", ""), str(option))
