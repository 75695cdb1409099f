"""The axis of balance: what keeps the experts in use. Several choices may be combined.

One convention (rule 4 of the design): a load-balancing loss is 1.0 at perfect balance per layer, then the mean over the
layers, over valid tokens only; a loss with another value at balance says so. A loss is linear in sums of per-token
terms once the totals are known: the load, and the number of tokens. So the totals are taken over everything that
belongs to one optimizer step, and each micro-batch and process adds its own linear share; the sum of the shares is the
loss of the whole, value and gradient.

Shape suffixes: L mixtures, T tokens, E experts, N positions that have a label, V words of the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from moelora.balance.totals import MixtureTotals
from moelora.choices import Choice
from moelora.ops.factors import Factors
from moelora.routing.decision import Routing
from moelora.validation import check, is_real

Reads = Literal["routing", "experts", "predictions"]
"""What a loss is one of."""


@dataclass(frozen=True, kw_only=True)
class Balance(Choice):
    """Base of the choices of balance.

    Args:
        coef: Coefficient of the loss, or the step of an update. 0 switches it off.

    Raises:
        ConfigError: For a negative one.
    """

    axis: ClassVar[str] = "balance"
    logged_as: ClassVar[str] = "balance_loss"
    """Name of the loss in the trainers' logs."""
    is_loss: ClassVar[bool] = True
    """Whether it is a loss at all, added or only logged; else it moves the routers' biases."""
    reads: ClassVar[Reads] = "routing"
    """What its loss is one of: routing decisions, by `of_routing`; the experts' weights, by `of_experts`; what two
    forwards predict, by `compared`."""
    needs_sums: ClassVar[bool] = False
    """Whether it reads `MixtureTotals.sums_L2E`."""
    coef_name: ClassVar[str] = "balance.coef"
    """What messages call `coef`."""

    coef: float = 0.0

    def __post_init__(self) -> None:
        check(is_real(self.coef) and self.coef >= 0, self.coef_name, self.coef, "a number of at least 0")

    @property
    def has_loss(self) -> bool:
        """Whether it adds a loss."""
        return self.is_loss and self.coef > 0

    @property
    def moves_bias(self) -> bool:
        """Whether it moves the routers' biases."""
        return not self.is_loss and self.coef > 0

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """The share of each of L mixtures in the loss [L], without the coefficient; only if it reads routing.

        A share is linear in the tokens given, so shares of disjoint sets of tokens add up to the loss of their union.

        Args:
            routing: The decisions of L mixtures as one: its tensors are [L, T, ...].
            valid_LT: True where a token is not padding.
            totals: Sums over all tokens that the loss is taken over.
        """
        raise NotImplementedError

    def compared(self, first_NV: Tensor, second_NV: Tensor) -> Tensor:
        """The loss of what two forwards predict, summed over N positions; only if it reads predictions.

        Args:
            first_NV, second_NV: Their logits.
        """
        raise NotImplementedError

    def of_experts(self, factors: Factors) -> Tensor:
        """The loss of the experts of one linear, without the coefficient; only if it reads experts.

        Args:
            factors: Their low-rank factors.
        """
        raise NotImplementedError

    def move(self, load_LE: Tensor) -> Tensor:
        """What is added to the biases of L routers after a training forward [L, E]; only with `moves_bias`.

        Args:
            load_LE: Choices of valid tokens that fell on each expert in that forward, over all processes.
        """
        raise NotImplementedError
