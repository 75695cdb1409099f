"""Checks of configuration values, with the messages they fail with."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args

from moelora.errors import ConfigError


def check(condition: bool, name: str, value: object, allowed: str, fix: str = "") -> None:
    """Raise unless `condition` holds.

    Raises:
        ConfigError: Names the field, its value, the allowed values and the fix.
    """
    if not condition:
        raise ConfigError(f"{name} is {value!r}; allowed: {allowed}." + (f" {fix}" if fix else ""))


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
            raise ConfigError(f"unknown key {key!r} in {where}.{hint} {words}")


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
