"""The axis of compute: how a mixture is computed. The result is the same up to rounding.

Shape suffixes: T tokens, D input features, O output features, E experts.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moelora.choices import Choice, register
from moelora.errors import ConfigError
from moelora.ops import reference
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.mixture_feed_forward import mixture_feed_forward
from moelora.ops.mixture_linear import mixture_linear
from moelora.ops.sparse_dropout import dropout
from moelora.routing.decision import Routing


@dataclass(frozen=True, kw_only=True)
class Compute(Choice):
    """Base of the choices of compute."""

    axis: ClassVar[str] = "compute"

    def check(self, config: Any) -> None:
        """Say it where the experts or the placement have no such form, and the one they have runs instead."""
        if (reason := self.missing_because(config)) is not None:
            warnings.warn(f"compute is {self.kind!r}, and {reason}; it runs as 'fast'.", stacklevel=2)

    def missing_because(self, config: Any) -> str | None:
        """Why a configuration has no such form; None where it has one."""
        return None

    def linear(
        self,
        x_TD: Tensor,
        factors: Factors,
        gates_TE: Tensor | None,
        base_TO: Tensor,
        separate: bool = False,
        p: float = 0.0,
    ) -> Tensor:
        """A mixture on one linear; see `moelora.ops.mixture_linear`."""
        return mixture_linear(x_TD, factors, gates_TE, base_TO, separate, p)

    def feed_forward(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """A mixture of feed-forward blocks; see `moelora.ops.mixture_feed_forward`."""
        raise NotImplementedError

    def feed_forward_linears(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """A block with a mixture on each of its linears, all by one decision."""
        gates_TE = routing.gates_TE()

        def linear(frozen: Callable[[Tensor], Tensor], factors: Factors | None, x: Tensor) -> Tensor:
            y = frozen(x)
            if factors is None:
                return y
            seen = x.to(factors.a_ERD.dtype)
            return self.linear(seen, factors, gates_TE, y, routing.separate, experts.dropout_p).to(y.dtype)

        up = linear(block.up, experts.up, x_TD)
        hidden = block.activate(up, None if block.gate is None else linear(block.gate, experts.gate, x_TD))
        hidden = hidden if block.hidden_dropout is None else block.hidden_dropout(hidden)
        y_TD = linear(block.down, experts.down, hidden)
        return y_TD if block.output_dropout is None else block.output_dropout(y_TD)


@register
@dataclass(frozen=True, kw_only=True)
class Fast(Compute):
    """The fast operations of `moelora.ops`, chosen by shape."""

    kind: ClassVar[str] = "fast"

    def feed_forward(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """See `Compute.feed_forward`."""
        return mixture_feed_forward(x_TD, routing, block, experts)


@register
@dataclass(frozen=True, kw_only=True)
class Compiled(Compute):
    """`torch.compile` makes the element-wise part of feed-forward mixtures on the CPU.

    Where that fails, a warning says why and it runs as "fast".
    """

    kind: ClassVar[str] = "compiled"

    def missing_because(self, config: Any) -> str | None:
        """Only feed-forward mixtures of low-rank experts have loops to compile."""
        if config.placement.kind != "feed_forward":
            return f"a mixture with placement {config.placement.kind!r} has no element-wise part to compile"
        kind = config.experts.kind
        return None if config.experts.is_low_rank else f"{kind!r} experts have one form, in plain autograd"

    def feed_forward(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """See `Compute.feed_forward`."""
        return mixture_feed_forward(x_TD, routing, block, experts, compiled=True)


@register
@dataclass(frozen=True, kw_only=True)
class Reference(Compute):
    """The per-token loops that the fast operations are tested against: slow, to find faults."""

    kind: ClassVar[str] = "reference"

    def missing_because(self, config: Any) -> str | None:
        """Experts that compute their output themselves have a reference in the tests alone, but for DoRA."""
        found = config.experts
        return None if found.has_reference else f"{found.kind!r} experts have one form, in plain autograd"

    def linear(
        self,
        x_TD: Tensor,
        factors: Factors,
        gates_TE: Tensor | None,
        base_TO: Tensor,
        separate: bool = False,
        p: float = 0.0,
    ) -> Tensor:
        """See `Compute.linear`."""
        a_ERD = factors.expanded_a_ERD()
        x_TD = dropout(x_TD, p)
        return base_TO + reference.mixture_linear(x_TD, a_ERD, factors.b_EOR, gates_TE, factors.scaling)

    def feed_forward(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """See `Compute.feed_forward`.

        Raises:
            ConfigError: In training with dropout, of which the reference draws none.
        """
        dropouts = [found for found in (block.hidden_dropout, block.output_dropout, experts.dropout) if found]
        if dropouts:
            raise ConfigError(
                f"compute is 'reference' and a feed-forward mixture trains with {dropouts[0]}; allowed: no dropout. "
                "The reference draws none; set lora_dropout=0 or use 'fast'."
            )
        assert block.dense is not None
        given = {"up": experts.up, "down": experts.down, "gate": experts.gate}
        loras = {
            role: (found.expanded_a_ERD(), found.b_EOR, found.scaling)
            for role, found in given.items()
            if found is not None
        }
        y_TD = reference.mixture_feed_forward(
            x_TD, routing.gates_TE(), block.dense(), loras, block.kind, block.activation
        )
        return y_TD.to(x_TD.dtype)
