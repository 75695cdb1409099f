"""The protocol of a choice, the registry of each axis, and reading and writing choices.

A method is a point on the axes of `AXES`; on each axis it is one choice, a small frozen dataclass. Its fields are the
file format (`{"kind": "top_k", "k": 2}`), its methods are the behaviour. Everything else (layers, counting, saving,
`inspect`, cards) reads choices through the protocol here and knows none by name.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
import pkgutil
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, Self, TypeVar

import torch
from torch import nn

from moelora.errors import ConfigError
from moelora.validation import check_keys

AXES = ("experts", "placement", "scores", "selection", "balance", "compute")

InitKind = Literal["zeros", "ones", "unit", "kaiming", "normal", "uniform", "base"]


@dataclass(frozen=True)
class Init:
    """How a tensor starts.

    Args:
        kind: "zeros"; "ones"; "unit", U(0, 1); "kaiming", `nn.Linear`'s default U(-1/sqrt(n), 1/sqrt(n)) with n the
            last dimension; "normal", N(0, scale); "uniform", U(-scale, scale); or "base", 0 until the experts fill it
            with what they make of the base (`Experts.start`).
        scale: See `kind`.
    """

    kind: InitKind
    scale: float = 0.0

    def fill(self, tensor: torch.Tensor) -> None:
        """Write the initial values."""
        if self.kind == "normal":
            nn.init.normal_(tensor, std=self.scale)
        elif self.kind == "uniform":
            nn.init.uniform_(tensor, -self.scale, self.scale)
        elif self.kind == "kaiming":
            # the rows of all experts together have the fan-in of one expert's
            nn.init.kaiming_uniform_(tensor.flatten(0, -2) if tensor.dim() > 2 else tensor, a=math.sqrt(5))
        elif self.kind == "unit":
            nn.init.uniform_(tensor)
        elif self.kind == "ones":
            nn.init.ones_(tensor)
        else:
            nn.init.zeros_(tensor)


@dataclass(frozen=True)
class Param:
    """One tensor that a choice owns: declared once, for allocating, counting, saving and moving it.

    Args:
        name: Its name. Tensors of experts have two parts, "A.up": a container that PEFT's tools see by name, and a
            role; tensors of routers have one.
        shape: Its shape.
        init: How it starts.
        trainable: Whether training moves it. If not it is saved all the same.
        dtype: A dtype it keeps whatever the model is cast to; None follows the model.
        num_frozen: How many entries of its first dimension, the first ones, training does not move (experts that are
            kept as they are). They are a tensor of their own, so that no optimizer can touch them: a gradient of zero
            would still leave them to weight decay.
        shared: A key. All sites of an adapter that declare a tensor of that name under it use one, which the first of
            them holds.
    """

    name: str
    shape: tuple[int, ...]
    init: Init
    trainable: bool = True
    dtype: torch.dtype | None = None
    num_frozen: int = 0
    shared: str | None = None

    def stored(self) -> list[Param]:
        """The tensors it is stored as: itself, or what is frozen of it under "..._frozen" and then the rest."""
        frozen = self.num_frozen
        if not self.trainable or 0 < self.shape[0] <= frozen:
            return [replace(self, trainable=False, num_frozen=0)]
        if frozen == 0:
            return [replace(self, num_frozen=0)]
        rest = self.shape[1:]
        return [
            replace(self, name=f"{self.name}_frozen", shape=(frozen, *rest), trainable=False, num_frozen=0),
            replace(self, shape=(self.shape[0] - frozen, *rest), num_frozen=0),
        ]

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def num_trainable(self) -> int:
        """Number of elements that training moves."""
        return sum(param.numel for param in self.stored() if param.trainable)


@dataclass(frozen=True, kw_only=True)
class Place:
    """What a plan finds out about a place, and hands on to the choices.

    Attributes:
        index: Its number among the sites that share its router.
        num_sharing: How many these are.
        base_experts: Number of experts of the block's own router, at a mixture of experts of the base; else 0.
        part: The part that a linear plays, where the placement goes by it: "key" or "value" of attention, "down" of a
            feed-forward block; else "".
        head_features: Features of one attention head of the model; 0 if it does not say.
        causal: Whether it is in a layer whose attention looks back only, as far as that can be told; else None.
        model_features: Features of the model's hidden states; 0 if it does not say.
        by_linear: Whether the experts of a feed-forward block are mixed at each of its linears, not as whole blocks.
        family: The sites of the adapter that are of one sort: the name with "*" for its numbers, and the sizes.
        member: Its number among these.
        num_members: How many these are.
    """

    index: int = 0
    num_sharing: int = 1
    base_experts: int = 0
    part: str = ""
    head_features: int = 0
    causal: bool | None = None
    model_features: int = 0
    by_linear: bool = False
    family: str = ""
    member: int = 0
    num_members: int = 1


@dataclass(frozen=True, kw_only=True)
class Site(Place):
    """What a choice may know of the place it declares tensors for.

    Attributes:
        name: Name of the wrapped module in the base model.
        linears: (in_features, out_features) of the linears that get experts, by role: "" of a single linear; "gate",
            "up" and "down" of a feed-forward block.
        num_experts: E; 1 at a site without a router.
        routed: Whether the site has a router.
        router_features: Features of the router's input.
        owns_router: Whether it holds that router's tensors; where routers are shared, one site holds them.
        num_null: How many of the experts, the last ones, are null.
    """

    name: str
    linears: Mapping[str, tuple[int, int]]
    num_experts: int
    routed: bool
    router_features: int
    owns_router: bool = True
    num_null: int = 0


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Base of the choices of all axes. A subclass names its `axis` and `kind` and is given to `register`."""

    axis: ClassVar[str]
    kind: ClassVar[str]
    refused: ClassVar[Mapping[str, str]] = {}
    """Fields of other choices that make no sense with this one, each with the reason."""

    @property
    def needs(self) -> frozenset[str]:
        """Facts of the `Batch` it cannot do without: "task_ids", "instance_embedding", or one that is derived."""
        return frozenset()

    def params(self, site: Site) -> list[Param]:
        """The tensors it owns at a site; nothing else is allocated."""
        return []

    def dropouts(self) -> dict[str, float]:
        """Dropout probabilities by name. Each is an `nn.Dropout`, so that tools which switch dropout off find it."""
        return {}

    def check(self, config: Any) -> None:
        """Refuse contradictions with the other axes of a `MoeLoraConfig`.

        Raises:
            ConfigError: With the reason.
        """

    def check_site(self, site: Site) -> None:
        """Refuse a place that it does not fit, before anything is changed.

        Raises:
            ConfigError: With the reason.
        """

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """The same choice for a mixture of some of its experts, none of them frozen.

        Args:
            experts: Their numbers, in the new order; one that comes twice becomes two experts.
            num_experts: E before.
        """
        return self

    def merged(self, groups: Sequence[Sequence[int]], num_experts: int) -> Self:
        """The same choice for a mixture in which each group of experts has become one.

        Args:
            groups: Numbers of experts; the first of each group is the one that the others joined.
            num_experts: E before.
        """
        return self.picked([group[0] for group in groups], num_experts)

    @property
    def num_frozen(self) -> int:
        """How many of the first experts are kept from training, where a choice can do that."""
        return 0

    def frozen(self, num_experts: int) -> Self:
        """The same choice with what belongs to the first so many experts kept from training.

        Args:
            num_experts: How many; 0 is none.
        """
        return self

    def new_rows(self, name: str, old: torch.Tensor, count: int) -> torch.Tensor | None:
        """What experts that are added have in a router's tensor, [count, ...]; None if that has to be given.

        Args:
            name: The tensor.
            old: Its rows for the experts that are there.
            count: How many are added.
        """
        return None

    def describe(self) -> str:
        """One phrase: the kind and the fields."""
        words = ", ".join(f"{f.name}={getattr(self, f.name)}" for f in dataclasses.fields(self))
        return f"{self.kind}({words})"


_C = TypeVar("_C", bound=type[Choice])
_KINDS: dict[str, dict[str, type[Choice]]] = defaultdict(dict)


def register(cls: _C) -> _C:
    """Class decorator: make a choice known under its axis and kind.

    Raises:
        ValueError: If the kind is taken.
    """
    if _KINDS[cls.axis].setdefault(cls.kind, cls) is not cls:
        raise ValueError(f"{cls.axis} {cls.kind!r} is registered twice: {_KINDS[cls.axis][cls.kind]} and {cls}")
    return cls


def kinds(axis: str) -> dict[str, type[Choice]]:
    """The choices of an axis by kind."""
    return dict(_KINDS[axis])


def read(axis: str, value: Any) -> Any:
    """Make a choice of what a file or a user says.

    Args:
        axis: One of `AXES`.
        value: A registered choice of that axis, its kind, or a mapping of its kind and fields.

    Raises:
        ConfigError: If the kind or a field is unknown or missing, or a value is not allowed.
    """
    known = _KINDS[axis]
    if type(value) in known.values():
        return value
    fields = {"kind": value} if isinstance(value, str) else value
    if not isinstance(fields, Mapping) or fields.get("kind") not in tuple(known):
        raise ConfigError(
            f"{axis} is {value!r}; allowed: a kind ({', '.join(map(repr, known))}), or a dict of a kind and its "
            f"fields, such as {write(next(iter(known.values()))()) if known else {}!r}."
        )
    cls = known[fields["kind"]]
    words = {key: word for key, word in fields.items() if key != "kind"}
    for key in words.keys() & cls.refused.keys():
        raise ConfigError(f"{axis} {cls.kind!r} has no {key}: {cls.refused[key]}")
    check_keys(f"{axis} {cls.kind!r}", words, [f.name for f in dataclasses.fields(cls)])
    return cls(**words)


def write(choice: Choice) -> dict[str, Any]:
    """A choice as plain JSON values: its kind and its fields."""
    return {"kind": choice.kind, **dataclasses.asdict(choice)}


def discover(package: str, path: Iterable[str]) -> None:
    """Import the modules of a package, so that what they register is known.

    Args:
        package: Its name.
        path: Its `__path__`.
    """
    for module in pkgutil.iter_modules(path):
        importlib.import_module(f"{package}.{module.name}")
