"""The published methods by name: functions of keyword words that return a configuration."""

from __future__ import annotations

import difflib
import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from moelora.errors import ConfigError

Verified = Literal[
    "golden values", "official code's formula", "paper's equations", "abstract only", "PEFT", "a control"
]

_F = TypeVar("_F", bound=Callable[..., Any])
_PRESETS: dict[str, Callable[..., Any]] = {}
_ABOUT: dict[str, About] = {}


@dataclass(frozen=True, kw_only=True)
class About:
    """Where a preset comes from.

    Attributes:
        paper: The number on arXiv, or another short reference; None of a control of our own.
        verified: What it was checked against: "golden values" that the official code gives; the "official code's
            formula" or the "paper's equations", written out as a naive reference; the "abstract only", with choices of
            ours; "PEFT", which has the same method; or nothing, for "a control".
    """

    paper: str | None
    verified: Verified


def preset(*, paper: str | None, verified: Verified) -> Callable[[_F], _F]:
    """Decorator: make a preset known under its function's name, which its configurations then bear.

    Args:
        paper, verified: See `About`.
    """

    def decorate(function: _F) -> _F:
        name = function.__name__

        @functools.wraps(function)
        def named(*args: Any, **words: Any) -> Any:
            config = function(*args, **words)
            config.preset = name
            return config

        _PRESETS[name] = named
        _ABOUT[name] = About(paper=paper, verified=verified)
        return cast(_F, named)

    return decorate


def about(name: str) -> About:
    """Where a preset comes from.

    Raises:
        ConfigError: If there is no such preset.
    """
    find(name)
    return _ABOUT[name]


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
        message = f"unknown preset {name!r}; allowed: {', '.join(_PRESETS)}.{guess}"
        raise ConfigError(message, anchor="unknown-preset")
    return _PRESETS[name]


def own_words(name: str) -> dict[str, Any]:
    """The types of the keyword words of a preset beside those of PEFT, by name.

    Raises:
        ConfigError: If there is no such preset.
    """
    function = find(name)
    parameters = inspect.signature(function).parameters.values()
    hints = typing.get_type_hints(inspect.unwrap(function))
    return {each.name: hints[each.name] for each in parameters if each.kind is each.KEYWORD_ONLY}
