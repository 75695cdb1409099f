"""Checks of configuration values, with the messages they fail with."""

from __future__ import annotations

import dataclasses
import difflib
import re
import types
from collections.abc import Iterable, Sequence
from typing import Any, Literal, Union, get_args, get_origin

from moelora.errors import ConfigError


def check(condition: bool, name: str, value: object, allowed: str, fix: str = "", *, anchor: str | None = None) -> None:
    """Raise unless `condition` holds.

    Raises:
        ConfigError: Names the field, its value, the allowed values and the fix.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}." + (f" {fix}" if fix else ""), anchor=anchor)


def check_choice(name: str, value: object, choices: Any) -> None:
    """Refuse what is not one of the values of a `Literal`."""
    allowed = get_args(choices)
    check(value in allowed, name, value, ", ".join(map(repr, allowed)))


def check_bool(name: str, value: object) -> None:
    """Refuse what is not True or False."""
    check(isinstance(value, bool), name, value, "True, False")


def check_pattern(name: str, value: object, allowed: str) -> None:
    """Refuse what is neither names nor a regex that compiles."""
    if isinstance(value, str):
        try:
            re.compile(value)
        except re.error as error:
            raise ConfigError(f"{name} is {value!r}; allowed: {allowed}. As a regular expression: {error}.") from error
        return
    names = isinstance(value, (list, set, tuple)) and all(isinstance(item, str) for item in value)
    check(names, name, value, allowed)


def unusable_name(name: object) -> str | None:
    """Why a name cannot be that of a file or folder, which an expert's is once it is exported; None if it can.

    Args:
        name: The name of an expert.
    """
    if not isinstance(name, str) or not name.strip():
        return "is no text"
    if name in (".", "..") or any(each in "/\\" or not each.isprintable() for each in name):
        return "has a slash or a control character, or is only dots"
    if len(name.encode()) > _LONGEST_NAME:
        return f"has {len(name.encode())} bytes, more than {_LONGEST_NAME}"
    return None


# File systems take 255; a temporary folder beside the output has a longer name.
_LONGEST_NAME = 200


def is_index(value: object) -> bool:
    """Whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_seed(value: object) -> bool:
    """Whether `value` is a seed that every library takes."""
    return is_index(value) and value < 2**32  # type: ignore[operator]


def is_real(value: object) -> bool:
    """Whether `value` is a number that is finite in float32, in which it is computed with."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= _LARGEST


# beyond it a number is infinite in float32
_LARGEST = (2 - 2**-23) * 2.0**127


def is_positive(value: object) -> bool:
    """Whether `value` is a number above 0 that is finite in float32."""
    return isinstance(value, (int, float)) and is_real(value) and value > 0


def is_share(value: object) -> bool:
    """Whether `value` is a number of at least 0 and below 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < 1.0


def did_you_mean(word: object, allowed: Iterable[str]) -> str:
    """The most similar of the allowed words as a question with a space before it; empty if none is similar."""
    close = difflib.get_close_matches(str(word), list(allowed), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def options_of(hint: Any) -> tuple[Any, ...]:
    """The types that a type hint allows: those of a union, or itself."""
    is_union = isinstance(hint, types.UnionType) or get_origin(hint) is Union
    return get_args(hint) if is_union else (hint,)


def fits(option: Any, value: object) -> bool:
    """Whether `value` is of one type, as `options_of` gives them: a whole number is a float, true is no number."""
    origin = get_origin(option)
    if origin is Literal:
        return value in get_args(option)
    if origin in (list, Sequence):
        items = value if isinstance(value, list if origin is list else (list, tuple)) else None
        return items is not None and all(fits(get_args(option)[0], item) for item in items)
    if origin is dict:
        item = get_args(option)[1]
        return isinstance(value, dict) and all(isinstance(k, str) and fits(item, v) for k, v in value.items())
    if option is Any:
        return True
    if option is type(None):
        return value is None
    if isinstance(value, bool):
        return option is bool
    return isinstance(value, (int, float) if option is float else option)


def type_name(option: Any) -> str:
    """How a message calls a type, as `options_of` gives them."""
    if get_origin(option) is Literal:
        return " or ".join(map(repr, get_args(option)))
    if option is type(None):
        return "null"
    if dataclasses.is_dataclass(option) or get_origin(option) is dict:
        return "a mapping"
    if get_origin(option) in (list, Sequence):
        return f"a list, each {type_name(get_args(option)[0])}"
    words = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false"}
    return words.get(getattr(option, "__name__", ""), str(option))


def check_word(name: str, value: object, hint: Any) -> None:
    """Refuse a word of a preset that is of another type, or a size that no model has, before it is used.

    Args:
        name: The word.
        value: Its value.
        hint: Its type in the preset.

    Raises:
        ConfigError: Names the word, its value and the types.
    """
    options = options_of(hint)
    check(any(fits(option, value) for option in options), name, value, " or ".join(map(type_name, options)))
    for each in value if isinstance(value, (list, tuple)) else [value]:
        if isinstance(each, int):
            check(abs(each) <= _LARGEST_SIZE, name, value, f"whole numbers up to {_LARGEST_SIZE:,}")


# Presets make lists of that length.
_LARGEST_SIZE = 1_000_000


def check_keys(where: str, given: Iterable[Any], allowed: Iterable[str]) -> None:
    """Refuse a key that is not allowed.

    Args:
        where: What the keys are in.
        given: The keys.
        allowed: All that there may be.

    Raises:
        ConfigError: Names the first such key, its likely meaning, and all allowed keys.
    """
    allowed = sorted(allowed)
    words = f"Allowed: {', '.join(allowed)}." if allowed else f"Allowed: none, {where} takes no settings."
    for key in given:
        if key not in allowed:
            hint = did_you_mean(key, allowed)
            raise ConfigError(f"unknown key {key!r} in {where}.{hint} {words}", anchor="unknown-key")


def check_at_least_one(section: object, where: str, *names: str) -> None:
    """Refuse a field that is neither None nor 1 or more.

    Args:
        section: What has the fields.
        where: Its name for the message.
        names: The fields.

    Raises:
        ConfigError: Names the field and its value.
    """
    for name in names:
        value = getattr(section, name)
        check(value is None or value >= 1, f"{where}.{name}", value, "at least 1")
