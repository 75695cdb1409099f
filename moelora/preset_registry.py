"""The published methods by name: functions of keyword words that return a configuration."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from moelora.errors import ConfigError

_F = TypeVar("_F", bound=Callable[..., Any])
_PRESETS: dict[str, Callable[..., Any]] = {}


def preset(function: _F) -> _F:
    """Decorator: make a preset known under its function's name, which its configurations then bear."""
    name = function.__name__

    @functools.wraps(function)
    def named(*args: Any, **words: Any) -> Any:
        config = function(*args, **words)
        config.preset = name
        return config

    _PRESETS[name] = named
    return cast(_F, named)


def available() -> list[str]:
    """The names `MoeLoraConfig.from_preset` takes."""
    return list(_PRESETS)


def find(name: str) -> Callable[..., Any]:
    """The function of a preset.

    Raises:
        ConfigError: If there is no such preset.
    """
    if name not in _PRESETS:
        guess = "".join(f" Did you mean {match!r}?" for match in difflib.get_close_matches(str(name), _PRESETS, n=1))
        raise ConfigError(f"unknown preset {name!r}; allowed: {', '.join(_PRESETS)}.{guess}")
    return _PRESETS[name]


def own_words(name: str) -> list[str]:
    """The keyword words of a preset beside those of PEFT.

    Raises:
        ConfigError: If there is no such preset.
    """
    parameters = inspect.signature(find(name)).parameters.values()
    return [parameter.name for parameter in parameters if parameter.kind is parameter.KEYWORD_ONLY]
