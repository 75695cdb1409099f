"""The axis of experts: what one expert computes, and which tensors hold it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor

from moelora.choices import Choice, Site
from moelora.ops.compute import Compute
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import Dense, FrozenFeedForward
from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.tensors import AdapterTensors
from moelora.validation import check


class Route(Protocol):
    """Decides for the rows of `x` [..., F]: one for each token, or `repeats` for each, one after the other."""

    def __call__(self, x: Tensor, /, repeats: int = 1) -> Routing: ...


class Base(Protocol):
    """The frozen module."""

    def __call__(self, x: Tensor, /) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class ExpertInput:
    """What experts that are no low-rank factors make a module's new output of.

    Attributes:
        x: The module's input [..., D].
        base: The frozen module.
        route: Asks the router; its decision is recorded and balanced.
        parts: See `Experts.factors`.
        scaling: The factor to use, `Experts.scaling` unless it was changed with `set_scale`.
        site: What was known of the place when the tensors were declared.
        tokens: What the batch says of the tokens.
        dropout: The dropout "lora_dropout" of the choice.
        compute: The choice of compute.
        dense: Gives weight and bias of each frozen linear, by its role.
        block: The parts of a feed-forward block; None of a linear.
    """

    x: Tensor
    base: Base
    route: Route
    parts: Mapping[str, AdapterTensors]
    scaling: float
    site: Site
    tokens: Tokens
    dropout: Any
    compute: Compute
    dense: Callable[[], Dense]
    block: FrozenFeedForward | None

    def tensor(self, name: str) -> Tensor:
        """A tensor of the experts by the name it was declared under."""
        first, _, last = name.partition(".")
        return self.parts[first].tensor(last)


@dataclass(frozen=True, kw_only=True)
class Experts(Choice):
    """Base of the choices of experts.

    Args:
        num_experts: Number of experts E of a mixture.
    """

    axis: ClassVar[str] = "experts"
    is_low_rank: ClassVar[bool] = False
    """Whether `factors` says all there is to say, and the fast operations do the rest; else `apply` does."""
    has_reference: ClassVar[bool] = False
    """Whether `compute="reference"` has per-token loops for them."""
    has_stacks: ClassVar[bool] = False
    """Whether each expert is a slice of A and of B, or of B alone, so that experts can be told apart; if they are low
    rank, too, they can be edited."""
    are_alike: ClassVar[bool] = True
    """Whether each expert of a mixture is one that the router may choose, with tensors of its own."""

    num_experts: int = 8

    def members(self) -> list[str]:
        """A phrase for each expert, where there is something to say of it by itself; else none."""
        return []

    @property
    def r(self) -> int:
        """The rank of one expert, where it has one."""
        return 1

    @property
    def lora_alpha(self) -> float:
        """LoRA's alpha; of experts without one what gives their scaling, since PEFT's hot swap reads it here."""
        return self.scaling * self.r

    @property
    def use_rslora(self) -> bool:
        """Whether the scaling is that of rank-stabilised LoRA."""
        return False

    @property
    def lora_dropout(self) -> float:
        """The probability that an input of the experts is dropped in training."""
        return 0.0

    def dropouts(self) -> dict[str, float]:
        """Of the experts' input."""
        return {"lora_dropout": self.lora_dropout}

    @property
    def scaling(self) -> float:
        """The factor of what an expert adds."""
        return 1.0

    def site_phrase(self, num_experts: int, routed: bool = True, roles: Sequence[str] = ()) -> str:
        """What stands at a site, for a table.

        Args:
            num_experts: How many experts are stored there.
            routed: Whether there is a mixture.
            roles: The linears of a feed-forward block that have experts.
        """
        return f"mixture of {num_experts} {self.kind} experts" if num_experts > 1 else f"{self.kind} adapter"

    def check_router_at_each_linear(self, config: Any, reason: str) -> None:
        """Refuse any other placement than single linears that all have a router.

        Args:
            config: The configuration.
            reason: Why these experts need it.

        Raises:
            ConfigError: With the reason.
        """
        placement = config.placement
        check(
            placement.kind == "linear" and placement.unrouted_modules is None,
            "placement",
            placement.describe(),
            f"'linear' without unrouted_modules, with {self.kind!r} experts",
            reason,
        )

    def router_features(self, site: Site) -> int:
        """Features of what a router looks at: those of the module's input, unless the experts show it something else.

        Args:
            site: The place.
        """
        return site.router_features

    @property
    def null_experts(self) -> int:
        """How many of a mixture's experts, the last ones, are null: what is sent to them stays with the base."""
        return 0

    @property
    def fewest(self) -> int:
        """Number of experts of the smallest mixture."""
        return self.num_experts

    def num_experts_at(self, member: int, num_members: int) -> int:
        """Number of experts of one mixture.

        Args:
            member: Its number among the sites of its sort, which is the number of its layer.
            num_members: How many these are.

        Raises:
            TargetError: If the experts do not fit that number of layers.
        """
        return self.num_experts

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`."""
        return replace(self.frozen(0), num_experts=len(experts))

    def start(self, parts: Mapping[str, AdapterTensors], dense: Callable[[], Dense]) -> None:
        """Fill the tensors that start at values of the base, those declared with `Init("base")`.

        Args:
            parts: See `factors`.
            dense: Gives weight [O, D] and bias of each frozen linear, by its role.
        """

    def factors(
        self, parts: Mapping[str, AdapterTensors], role: str, scaling: float, site: Site | None = None
    ) -> Factors | None:
        """The low-rank factors of all experts on the linear `role`, or None if it has no experts.

        Args:
            parts: The modules that hold the adapter's tensors at the site, by the first parts of the declared names.
            role: The linear.
            scaling: The factor to use, `self.scaling` unless it was changed with `set_scale`.
            site: The place.
        """
        return None

    def apply(self, given: ExpertInput) -> Tensor:
        """The module's new output [..., O], of experts that are no low-rank factors."""
        raise NotImplementedError
