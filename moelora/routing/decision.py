"""The record of a routing decision.

Shape suffixes: T tokens (all sequences of the batch, flattened), E experts, K chosen experts of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moelora.routing.batch import Tokens


@dataclass(frozen=True, eq=False)
class Routing:
    """Who computes each token, and with what weight.

    Decisions of several layers may be one, with an axis of the layers in front of T (`moelora.routing.stack`).

    Attributes:
        logits_TE: Scores before the activation, fp32.
        probs_TE: Scores as a distribution over the experts (softmax, or sigmoids divided by their sum), fp32; what the
            balance loss calls P.
        weights_TK: Weight of each chosen expert in the output; 0 for a choice that was dropped. Without `ids_TK` all
            experts, in order (K = E).
        ids_TK: Indices of the chosen experts, best first; None where all experts have a weight, perhaps 0.
        assigned_TK: Whether a choice counts as the router's choice for the expert's load: False for experts removed by
            expert dropout or below a threshold; True for those past the capacity, whose excess is what balancing is to
            reduce. None: all do.
        sums_to_one: Whether a token's weights always sum to one. Else a feed-forward block, which is inside every
            expert, is scaled by their sum.
        separate: Whether each expert is computed by itself, in products whose shapes do not depend on the others: then
            an expert that is added or dropped changes no bit of what goes to another one.
        tokens: What the batch says of the tokens, for a balance that goes by their sequences; None where no balance
            does.
    """

    logits_TE: Tensor
    probs_TE: Tensor
    weights_TK: Tensor
    ids_TK: Tensor | None
    assigned_TK: Tensor | None = None
    sums_to_one: bool = False
    separate: bool = False
    tokens: Tokens | None = None

    @property
    def num_experts(self) -> int:
        """E."""
        return self.probs_TE.shape[-1]

    @property
    def num_choices(self) -> int:
        """K: weights per token; E without `ids_TK`."""
        return self.weights_TK.shape[-1]

    def gates_TE(self) -> Tensor:
        """The weights as a dense matrix, 0 where an expert was not chosen; differentiable."""
        if self.ids_TK is None:
            return self.weights_TK
        return torch.zeros_like(self.probs_TE).scatter_(-1, self.ids_TK, self.weights_TK)

    def load_TE(self) -> Tensor:
        """How many of a token's choices fell on each expert (0 or 1), without gradient.

        Without `ids_TK` it is `assigned_TK`, or P itself where all experts count.
        """
        if self.ids_TK is None:
            return self.probs_TE.detach() if self.assigned_TK is None else self.assigned_TK.to(self.probs_TE.dtype)
        # no expert is chosen twice by a token, so that writing is as good as adding
        load_TE = torch.zeros_like(self.probs_TE, requires_grad=False)
        if self.assigned_TK is None:
            return load_TE.scatter_(-1, self.ids_TK, 1.0)
        return load_TE.scatter_(-1, self.ids_TK, self.assigned_TK.to(load_TE.dtype))

    def sums_2E(self, valid_T: Tensor) -> Tensor:
        """What each expert gets of the valid tokens: the sum of its weights, and its load, [2, E]."""
        return torch.stack([(self.gates_TE() * valid_T.unsqueeze(-1)).sum(-2), self.counts_E(valid_T)], -2)

    def counts_E(self, valid_T: Tensor) -> Tensor:
        """Choices of valid tokens that fell on each expert, without gradient."""
        return (self.load_TE() * valid_T.unsqueeze(-1)).sum(-2)
