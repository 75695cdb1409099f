"""Checks of configuration values, with the messages they fail with."""

from __future__ import annotations

import difflib
import math
import re
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


def is_index(value: object) -> bool:
    """Whether `value` is an integer of at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def is_count(value: object) -> bool:
    """Whether `value` is an integer of at least 1."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def is_real(value: object) -> bool:
    """Whether `value` is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def is_share(value: object) -> bool:
    """Whether `value` is a number of at least 0 and below 1."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0.0 <= value < 1.0


def check_keys(what: str, given: Any, valid: Any) -> None:
    """Refuse unknown keys.

    Raises:
        ConfigError: Names each unknown key, its likely meaning, and all valid keys.
    """
    valid = sorted(valid)
    unknown = sorted(set(given) - set(valid))
    if not unknown:
        return
    hints = [(key, difflib.get_close_matches(key, valid, n=1)) for key in unknown]
    guess = "".join(f" Did you mean {match[0]!r} instead of {key!r}?" for key, match in hints if match)
    raise ConfigError(f"unknown key(s) {unknown} for {what}; valid keys: {', '.join(valid)}.{guess}")
