"""One expert, drawn in training, with a gradient that accounts for those that were not drawn (SparseMixer).

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection
from moelora.validation import check, is_share


@register
@dataclass(frozen=True, kw_only=True)
class SparseMixer(Selection):
    """In training one expert is drawn by its probability, else the likeliest is taken; its weight is that probability.

    The gradient of a top-1 weight leaves out that another choice would have given another output. SparseMixer (arXiv
    2310.00811) draws the choice and estimates that part by an ODE's solver, here Heun's method of third order as in the
    authors' later code (GRIN, arXiv 2409.12136): the weight of a drawn expert that is not the likeliest is a third of
    its probability in three of four draws, and the gradient is that of the probability always.

        p = softmax of the logits that are near the highest,   e ~ p,   w = m p_e,   dw = dp_e
        m = 1 if e is the likeliest or with chance 1/4, else 1/3

    Args:
        jitter: A logit z is near the highest h if `(h - z) / max(|z|, h) <= 2 jitter`; the rest has no chance, in
            evaluation neither. transformers' Phi-MoE has 0.01.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "sparse_mixer"

    jitter: float = 0.1

    def __post_init__(self) -> None:
        check(is_share(self.jitter), "selection.jitter", self.jitter, "0 <= jitter < 1")

    def check(self, config: Any) -> None:
        """Refuse scores that are not probabilities, routers that learn nothing, and feed-forward blocks.

        Raises:
            ConfigError: With the reason.
        """
        if not config.scores.is_distribution:
            raise ConfigError(
                f"selection 'sparse_mixer' draws by probabilities, and {config.scores.describe()} are none; allowed: "
                "scores with activation='softmax' and no bias."
            )
        check(
            config.placement.kind != "feed_forward",
            "placement",
            config.placement.kind,
            "a placement on linears with 'sparse_mixer' selection",
            "The block is inside every expert, and would be scaled by a third of a probability at random; take 'top_k' "
            "with straight_through=True.",
        )

    def experts_per_token(self, num_experts: int) -> int:
        """1."""
        return 1

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        logits_TE = scored.logits_TE
        with torch.no_grad():
            highest_T1, ids_T1 = logits_TE.max(-1, keepdim=True)
            is_far_TE = (highest_T1 - logits_TE) / torch.maximum(logits_TE.abs(), highest_T1) > 2 * self.jitter
        near_TE = logits_TE.masked_fill(is_far_TE, float("-inf"))
        probs_TE = near_TE.softmax(-1)
        if not given.training:
            return Routing(logits_TE, scored.probs_TE, probs_TE.gather(-1, ids_T1), ids_T1)
        best_T1 = ids_T1
        # the highest after noise of Gumbel's law is a draw by the softmax
        ids_T1 = (near_TE.detach() - torch.empty_like(near_TE).exponential_().log()).argmax(-1, keepdim=True)
        is_whole_T1 = (ids_T1 == best_T1) | (torch.rand_like(highest_T1) > 0.75)
        weights_T1 = probs_TE.gather(-1, ids_T1)
        taken_off_T1 = weights_T1.detach().masked_fill(is_whole_T1, 0.0) * (2 / 3)
        return Routing(logits_TE, scored.probs_TE, weights_T1 - taken_off_T1, ids_T1)
