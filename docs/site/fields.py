"""The fields of dataclasses and the words of presets with their defaults and meanings, read from the code."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from griffe import Docstring, DocstringSection, Parser

from moelora import preset_registry
from moelora.choices import AXES, Choice, kinds, write
from moelora.config import MoeLoraConfig
from moelora.errors import MoeLoraError


@dataclass(frozen=True, kw_only=True)
class Field:
    """One key of a file.

    Attributes:
        name: The key.
        type: Its type, as the code has it.
        default: Its default, as YAML would have it; "required" where it has none.
        meaning: What the docstring says of it; "" where it says nothing.
    """

    name: str
    type: str
    default: str
    meaning: str


def summary(cls: type) -> str:
    """The text of a docstring above its first section, in Markdown."""
    texts = [section.value for section in sections(cls) if section.kind.value == "text"]
    return "\n\n".join(texts)


def sections(described: Any) -> list[DocstringSection]:
    """The sections of a docstring."""
    return Docstring(inspect.getdoc(described) or "").parse(Parser.google, warnings=False)


def meanings(cls: type) -> dict[str, str]:
    """What the docstrings of a class and its bases say of each argument, in one line."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        if "__doc__" not in vars(base):
            continue
        for section in Docstring(inspect.cleandoc(base.__doc__ or "")).parse(Parser.google, warnings=False):
            if section.kind.value not in ("parameters", "attributes"):
                continue
            for each in section.value:
                for name in each.name.split(","):  # "experts, placement: A choice on each axis"
                    found[name.strip()] = " ".join(each.description.split())
    return found


def fields_of(cls: type) -> list[Field]:
    """The fields of a dataclass that a file may give."""
    known = meanings(cls)
    found = []
    for each in dataclasses.fields(cls):
        if not each.init:
            continue
        if each.default is not dataclasses.MISSING:
            default = in_yaml(each.default)
        elif each.default_factory is not dataclasses.MISSING:
            made = each.default_factory()
            default = "its defaults" if dataclasses.is_dataclass(made) else in_yaml(made)
        else:
            default = "required"
        found.append(Field(name=each.name, type=str(each.type), default=default, meaning=known.get(each.name, "")))
    return found


def in_yaml(value: Any) -> str:
    """A plain value as a YAML file has it."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(in_yaml, value))}]"
    return "{}" if value == {} else str(value)


@functools.cache
def preset_words(preset: str) -> list[tuple[Field, list[str]]]:
    """The words of a preset, each with the fields of choices that it changes, such as "selection.k".

    They are found by trying: the preset is made with the default and with another value, and the two are compared.
    """
    parameters = inspect.signature(preset_registry.find(preset)).parameters
    found = []
    for name in preset_registry.own_words(preset):
        parameter = parameters[name]
        changed = _changed_fields(preset, name, parameter.default)
        meaning = _meaning(changed[0]) if changed else ""
        field = Field(name=name, type=str(parameter.annotation), default=in_yaml(parameter.default), meaning=meaning)
        found.append((field, changed))
    return found


def _meaning(place: str) -> str:
    axis, kind, name = place.split(".")
    return meanings(kinds(axis)[kind]).get(name, "")


def _changed_fields(preset: str, word: str, default: Any) -> list[str]:
    """The places "axis.kind.field" that another value of a word changes, the one of the word's own name first."""
    make = preset_registry.find(preset)
    before = _flat(make())
    for value in _others(default):
        try:
            after = _flat(make(**{word: value}))
        except (MoeLoraError, TypeError, ValueError, ZeroDivisionError):
            continue  # a value that the preset refuses
        changed = [place for place in {**before, **after} if before.get(place, 0) != after.get(place, 0)]
        if changed:
            return sorted(_shortened(changed, before, after), key=lambda place: not place.endswith(f".{word}"))
    # No value that was tried is allowed: the field of that name, as "top_k" of a selection's k.
    return [place for place in before if f"_{word}".endswith(f"_{place.rpartition('.')[2]}")]


def _shortened(changed: list[str], before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """Of a choice that comes or goes whole its coefficient stands for all; where one goes, another takes its place."""

    def is_in(choice: str, places: dict[str, Any]) -> bool:
        return any(place.startswith(f"{choice}.") for place in places)

    choices = {place.rpartition(".")[0] for place in changed}
    if any(not is_in(choice, after) for choice in choices):
        changed = [place for place in changed if is_in(place.rpartition(".")[0], before)]
    both = [place for place in changed if all(is_in(place.rpartition(".")[0], places) for places in (before, after))]
    return [*both, *(place for place in changed if place not in both and place.endswith(".coef"))]


def _flat(config: MoeLoraConfig) -> dict[str, Any]:
    choices: list[Choice] = config.choices()
    return {
        f"{choice.axis}.{choice.kind}.{name}": value
        for choice in choices
        for name, value in write(choice).items()
        if name != "kind"
    }


def _others(default: Any) -> Iterator[Any]:
    """Values to try in place of a default."""
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, (int, float)):
        yield from (default + 1, default * 2, default / 2, 1, 2, 0.5, 0.1, 0.0)
    elif isinstance(default, (list, tuple)):
        yield from ([*default, *default], default[:1], [1, 2])
    elif isinstance(default, str):
        yield from _literals()
    else:
        yield from (1, 4, 0.5, 1.0, True, False, [1, 2], "orthogonal")


def _literals() -> Iterator[str]:
    for axis in AXES:
        for kind, cls in kinds(axis).items():
            yield kind
            for hint in typing.get_type_hints(cls).values():
                yield from (value for value in typing.get_args(hint) if isinstance(value, str))
