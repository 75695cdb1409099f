"""A frozen feed-forward block and the experts around it, as functions and tensors.

Shape suffixes: T tokens, F inner features, E experts, R rank of one expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moelora.autocast import autocast_dtype
from moelora.ops.factors import Factors

Dense = dict[str, tuple[Tensor, Tensor | None]]
"""Weight [out, in] and bias of linears, by their roles."""


@dataclass(frozen=True, eq=False)
class FrozenFeedForward:
    """The frozen parts of a feed-forward block, as functions; `down` includes its bias.

    Attributes:
        kind: "gated": `down(act(gate x) * up x)`; "plain": `down(act(up x))`; "fused": `up` gives gate and up halves.
        up, down: The linears.
        gate: The gate linear of a gated block.
        activation: act.
        down_bias: Bias of `down`, if it has one.
        hidden_dropout: The block's own dropout between activation and `down`, where it is active.
        output_dropout: The block's own dropout behind `down`, where it is active.
        dense: Weight [out, in] and bias of each linear by its role, for the reference.
    """

    kind: str
    up: Callable[[Tensor], Tensor]
    down: Callable[[Tensor], Tensor]
    activation: Callable[[Tensor], Tensor]
    gate: Callable[[Tensor], Tensor] | None = None
    down_bias: Tensor | None = None
    hidden_dropout: Callable[[Tensor], Tensor] | None = None
    output_dropout: Callable[[Tensor], Tensor] | None = None
    dense: Callable[[], Dense] | None = None

    def activate(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """The hidden units of pre-activations; a fused `up` holds those of the gate in its first half."""
        if self.kind == "fused":
            gate, up = up.chunk(2, dim=-1)
        return self.activation(up) if gate is None else self.activation(gate) * up


@dataclass(frozen=True, eq=False)
class FeedForwardExperts:
    """The experts of one mixture on a feed-forward block.

    Attributes:
        up, down, gate: Their factors on each linear; None for a linear without experts.
        dropout: LoRA dropout, applied to the input of each A; None where it is not active.
    """

    up: Factors | None
    down: Factors | None
    gate: Factors | None
    dropout: Callable[[Tensor], Tensor] | None = None

    @property
    def dropout_p(self) -> float:
        """The probability of that dropout, for operations that draw it themselves.

        Raises:
            TypeError: If it is another function.
        """
        if self.dropout is None:
            return 0.0
        if not isinstance(self.dropout, nn.Dropout):
            raise TypeError(f"dropout is {self.dropout!r}; allowed: nn.Dropout or None, since its mask is drawn again.")
        return self.dropout.p

    def in_compute_dtype(self, device: torch.device) -> FeedForwardExperts:
        """The experts in the dtype to compute in: their own, as PEFT's LoRA does, or autocast's, as it would."""
        found = [factors for factors in (self.up, self.down, self.gate) if factors is not None]
        dtype = autocast_dtype(device)
        if dtype is None and len({part.dtype for factors in found for part in (factors.a_ERD, factors.b_EOR)}) > 1:
            dtype = torch.float32
        if dtype is None:
            return self
        up, down, gate = (None if factors is None else factors.to(dtype) for factors in (self.up, self.down, self.gate))
        return replace(self, up=up, down=down, gate=gate)
