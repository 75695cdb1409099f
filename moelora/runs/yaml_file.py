"""YAML as the programs read it, with `key=value` overrides."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from moelora.errors import RunError
from moelora.runs.wording import one_line


class _Loader(yaml.SafeLoader):
    """YAML 1.2's scalars, and no key twice.

    PyYAML follows YAML 1.1, where `1e-3` is a text for want of a dot, and `no`, as in `save_strategy: no`, is false.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = [key for index, key in enumerate(keys) if key in keys[:index]]
        if twice:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_BOOL, _FLOAT = "tag:yaml.org,2002:bool", "tag:yaml.org,2002:float"
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag != _BOOL]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(
    _FLOAT, re.compile(r"^[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"), list("-+.0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse YAML as the programs here understand it.

    Raises:
        yaml.YAMLError: If it is not YAML.
    """
    return yaml.load(text, Loader=_Loader)


def read_words(path: str | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """A YAML file's mapping, with overrides applied.

    Args:
        path: The YAML file.
        overrides: As of `load_config`.

    Raises:
        RunError: If the file cannot be read or is no mapping, or an override is not valid.
    """
    path = Path(path)
    try:
        words = parse_yaml(path.read_text())
    except OSError as error:
        raise RunError(f"cannot read the configuration {str(path)!r}: {error.strerror}.") from error
    except yaml.YAMLError as error:
        raise RunError(f"{str(path)!r} is not valid YAML: {one_line(error)}") from error
    if not isinstance(words, dict):
        raise RunError(f"{str(path)!r} holds {type(words).__name__}; it must hold a mapping of keys to values.")
    for override in overrides:
        apply_override(words, override)
    return words


def apply_override(words: dict[str, Any], override: str) -> None:
    """Set one `key=value` in the nested mapping `words`.

    Raises:
        RunError: If it has no "=", the value is not YAML, or the key leads through something that is not a mapping.
    """
    key, equals, text = override.partition("=")
    if not equals or not key:
        raise RunError(f"override {override!r} is not key=value, such as adapter.r=8 or training.max_steps=20.")
    try:
        value = parse_yaml(text)
    except yaml.YAMLError as error:
        raise RunError(f"the value of override {override!r} is not valid YAML: {one_line(error)}") from error
    *parents, last = key.split(".")
    place = words
    for depth, parent in enumerate(parents):
        if place.get(parent) is None:
            place[parent] = {}
        place = place[parent]
        if not isinstance(place, dict):
            raise RunError(f"override {override!r}: {'.'.join(parents[: depth + 1])} is {place!r}, which has no keys.")
    place[last] = value
