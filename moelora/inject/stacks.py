"""`layers_to_transform`: which stack of layers a module is in, and at which index.

PEFT takes the first number in a module's name, or the number behind one of `layers_pattern`. It takes that of each
stack of the model, and takes no number of a module that is named in full; both are refused here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from moelora.errors import TargetError


def layer_of(name: str, layers_pattern: list[str] | str | None) -> tuple[str, str, int] | None:
    """Where a module is, by PEFT's rule (`check_target_module_exists`).

    Args:
        name: The module's name.
        layers_pattern: As in the configuration.

    Returns:
        The pattern that fits ("" without one), the stack's name with "*" for the numbers in it, and the layer's index.
    """
    patterns = [layers_pattern] if isinstance(layers_pattern, str) else list(layers_pattern or ())
    for pattern in patterns or [""]:
        regex = rf"(?:^|.*?\.){pattern}\.(?P<index>\d+)\." if pattern else r".*?\.[^.]*\.(?P<index>\d+)\."
        match = re.match(regex, name)
        if match is not None:
            stack = name[: match.start("index") - 1]
            return pattern, re.sub(r"\b\d+\b", "*", stack), int(match["index"])
    return None


def check_layers(
    targeted: Iterable[str], layers_to_transform: list[int] | int | None, layers_pattern: list[str] | str | None
) -> None:
    """Refuse targets outside the layers that were asked for, and an index that could mean several stacks.

    Args:
        targeted: Names of the modules that PEFT's rules pick.
        layers_to_transform: As in the configuration; with None there is nothing to check.
        layers_pattern: As in the configuration.

    Raises:
        TargetError: Names the module, or the stacks.
    """
    if layers_to_transform is None:
        return
    asked = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    stacks: dict[str, set[str]] = {}
    for name in targeted:
        place = layer_of(name, layers_pattern)
        if place is None or place[2] not in asked:
            found = "in no layer" if place is None else f"in layer {place[2]} of {place[1]!r}"
            raise TargetError(
                f"target {name!r} is named in full and is {found}, but layers_to_transform={layers_to_transform!r}; "
                "allowed: targets in those layers. Give the end of its name only, or leave layers_to_transform out."
            )
        stacks.setdefault(place[0], set()).add(place[1])
    for pattern, names in stacks.items():
        if len(names) > 1:
            listed = ", ".join(sorted(names))
            meant = f"layers_pattern={pattern!r}" if pattern else "layers_pattern=None"
            raise TargetError(
                f"layers_to_transform={layers_to_transform!r} with {meant} picks layers of {len(names)} stacks "
                f"({listed}); allowed: one stack for each name in layers_pattern. Name the stack that is meant, as in "
                f"layers_pattern={[min(names)]!r}, or all of them if all are meant: layers_pattern={sorted(names)!r}."
            )
