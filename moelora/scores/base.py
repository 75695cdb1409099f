"""The axis of scores: from a token to a number for each expert.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from moelora.choices import Choice
from moelora.routing.batch import Tokens


@dataclass(frozen=True, eq=False)
class RouterInput:
    """What a router looks at.

    Attributes:
        x_TD: The tokens.
        tokens: What the batch says of them: padding, sequences.
        num_experts: E.
        tensors: The router's tensors, by the names that the choices declare.
        dropouts: Probability of each dropout that the choices declare, now; 0 outside training.
        training: Whether the layer is in training mode.
        prepared: What `Scores.prepare` made for the tokens at the model's entry, [T, ...]; None if it makes nothing.
        site_index: The number of the site among those that share the router.
        num_null: How many of the experts, the last ones, are null.
    """

    x_TD: Tensor
    tokens: Tokens
    num_experts: int
    tensors: Mapping[str, Tensor]
    dropouts: Mapping[str, float]
    training: bool
    prepared: Tensor | None = None
    site_index: int = 0
    num_null: int = 0


@dataclass(frozen=True, eq=False)
class Scored:
    """The scores of T tokens, in fp32.

    Attributes:
        logits_TE: Output of the router's linear.
        probs_TE: The scores as a distribution over the experts; what a balance loss calls P.
        scores_TE: What experts are chosen and weighted by.
        is_softmax: Whether the scores are the softmax of the logits.
        bias_E: Added to the scores in choosing experts, and not in weighing them; None if nothing is.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    scores_TE: Tensor
    is_softmax: bool
    bias_E: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Scores(Choice):
    """Base of the choices of scores."""

    axis: ClassVar[str] = "scores"
    reads_base_router: ClassVar[bool] = False
    """Whether it takes over what the router of the wrapped block decides, `RouterInput.prepared` [T, 2, E]."""

    @property
    def is_trained(self) -> bool:
        """Whether training moves the router."""
        raise NotImplementedError

    @property
    def is_distribution(self) -> bool:
        """Whether a token's scores are positive and sum to one over the experts."""
        return False

    @property
    def ignores_input(self) -> bool:
        """Whether the scores look at the batch alone, not at the layer's input, nor at tensors of one site's own."""
        return False

    @property
    def reads_batch(self) -> bool:
        """Whether a token's scores depend on the batch it is in, its padding or its sequences, beside `needs`."""
        return False

    @property
    def differs_by_site(self) -> bool:
        """Whether sites that share a router get different scores, by their numbers."""
        return False

    def prepare(
        self, hidden_BSD: Tensor, tensors: Mapping[str, Tensor], dropouts: Mapping[str, float], num_experts: int
    ) -> Tensor:
        """What all sites need of the base model's last hidden states, made once at the model's entry: [B, S, ...].

        It is asked of scores that need `BASE_HIDDEN`.

        Args:
            hidden_BSD: The hidden states.
            tensors, dropouts, num_experts: As in `RouterInput`.
        """
        raise NotImplementedError

    def score(self, given: RouterInput) -> Scored:
        """The scores of each token."""
        raise NotImplementedError
