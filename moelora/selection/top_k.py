"""Top-k selection, with its options: renormalised weights, expert dropout, a capacity.

Shape suffixes: T tokens, E experts, K chosen experts of a token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch

from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection, renormalize, renormalize_beside_null
from moelora.selection.capacity import within_capacity
from moelora.validation import check, check_bool, is_count, is_real, is_share


@register
@dataclass(frozen=True, kw_only=True)
class TopK(Selection):
    """Every token is sent to the `k` experts of the highest scores, or scores and a bias that only selects.

    Args:
        k: Number of experts of a token.
        renormalize: Whether the weights of the chosen experts are divided by their sum (where some are null, by that of
            the others). With k = 1 that makes each weight 1, so the router would get no gradient from the task; it is
            refused for a trained router.
        expert_dropout: Probability of dropping an expert's score, for one token, in training (SiRA).
        capacity_factor: An expert takes at most `ceil(capacity_factor * k * S / E)` choices of a sequence of S valid
            tokens, first choices first, then in token order; what is past it is dropped. None is no limit.
        capacity: The same limit as a number of choices, for a sequence of any length; not with a `capacity_factor`.
        multiply_by_gate: Whether a chosen expert is weighted by its score at all. If not each weight is 1, so that the
            router learns from the balance loss alone, which a trained router must have then.
        straight_through: Whether the renormalised weights have the gradient of those that are not (Bengio et al., arXiv
            1308.3432). A single choice then has weight 1, so that a feed-forward block is not scaled, and its router
            learns of the task all the same.
        dense_in_training: Whether every token is sent to all experts in training, and to `k` outside (DS-MoE, arXiv
            2404.05567). Its mutual-information loss is not here.
        capacity_in_eval: Whether the capacity holds outside training too. It makes an output depend on later tokens
            of the sequence, so generation with and without a KV cache can then differ.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "top_k"
    chooses_by_rank: ClassVar[bool] = True

    k: int = 2
    renormalize: bool = True
    expert_dropout: float = 0.0
    capacity_factor: float | None = None
    capacity_in_eval: bool = False
    capacity: int | None = None
    multiply_by_gate: bool = True
    straight_through: bool = False
    dense_in_training: bool = False

    def __post_init__(self) -> None:
        check(is_count(self.k), "top_k", self.k, "an integer of at least 1")
        check_bool("selection.renormalize", self.renormalize)
        for name in ("capacity_in_eval", "straight_through", "dense_in_training"):
            check_bool(f"selection.{name}", getattr(self, name))
        check_bool("multiply_by_gate", self.multiply_by_gate)
        check(
            self.multiply_by_gate or not self.renormalize,
            "selection.renormalize",
            self.renormalize,
            "False with multiply_by_gate=False",
            "There is nothing to divide where each weight is 1.",
        )
        check(
            self.renormalize or not self.straight_through,
            "selection.straight_through",
            self.straight_through,
            "False without renormalize",
            "Weights that are not renormalised have their own gradient.",
        )
        check(is_share(self.expert_dropout), "expert_dropout", self.expert_dropout, "0 <= expert_dropout < 1")
        factor = self.capacity_factor
        check(
            factor is None or (is_real(factor) and factor > 0), "capacity_factor", factor, "a positive number, or None"
        )
        most = self.capacity
        check(
            most is None or (is_count(most) and factor is None),
            "capacity",
            most,
            "an integer of at least 1, or None; None with a capacity_factor",
        )
        check(
            self.has_capacity or not self.capacity_in_eval,
            "capacity_in_eval",
            self.capacity_in_eval,
            "False without a capacity_factor or a capacity",
        )
        plain = not (self.has_capacity or self.expert_dropout or self.straight_through)
        check(
            plain or not self.dense_in_training,
            "selection.dense_in_training",
            self.dense_in_training,
            "False with expert_dropout, a capacity or straight_through",
            "They change what is chosen in training, where then nothing is.",
        )

    @property
    def has_capacity(self) -> bool:
        """Whether there is a limit to what an expert takes."""
        return self.capacity_factor is not None or self.capacity is not None

    def check(self, config: Any) -> None:
        """Refuse more choices than experts, and weights that leave a trained router without a gradient.

        And choices in training that nobody makes to be counted.

        Raises:
            ConfigError: With the reason.
        """
        num_experts, fewest = config.experts.num_experts, config.experts.fewest
        check(
            self.k <= fewest,
            "top_k",
            self.k,
            f"1 to num_experts ({fewest}{' where there are fewest' if fewest < num_experts else ''}), or dense "
            "selection",
            "Lower top_k or raise num_experts.",
            anchor="top-k",
        )
        trains_router = config.scores.is_trained and not config.inference_mode
        no_gradient = self.renormalize and not self.straight_through and not self.dense_in_training
        if self.k == 1 < num_experts and no_gradient and trains_router:
            raise ConfigError(
                "top_k is 1 with renormalize=True: each weight is w / w = 1, so the task gives the router no gradient; "
                "allowed: renormalize=False (the raw weight, as in Switch), straight_through=True, top_k of at least "
                "2, or a router that is not trained.",
                anchor="top-1",
            )
        learns = self.multiply_by_gate or any(choice.has_loss for choice in config.balance)
        if num_experts > 1 and trains_router and not learns:
            raise ConfigError(
                "multiply_by_gate is False: each weight is 1, so the task gives the router no gradient, and there is "
                "no balance loss that would; allowed: a balance loss (balance_coef above 0), multiply_by_gate=True, or "
                "a router that is not trained."
            )
        check(
            not self.dense_in_training or not any(choice.moves_bias for choice in config.balance),
            "selection.dense_in_training",
            self.dense_in_training,
            "False with the balance choice 'bias_update'",
            "It counts choices, and in training all experts get all tokens.",
        )

    def picked(self, experts: Sequence[int], num_experts: int) -> Self:
        """See `Choice.picked`: no more choices than experts."""
        return replace(self, k=min(self.k, len(experts)))

    def dropouts(self) -> dict[str, float]:
        """Of the scores."""
        return {"expert_dropout": self.expert_dropout}

    def experts_per_token(self, num_experts: int) -> int:
        """K."""
        return min(self.k, num_experts)

    @property
    def reads_batch(self) -> bool:
        """With a capacity."""
        return self.has_capacity

    @property
    def ignores_input(self) -> bool:
        """Without dropout and capacity."""
        return self.expert_dropout == 0 and not self.has_capacity

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        scores_TE, assigned_TK, kept_TE = scored.scores_TE, None, None
        if self.dense_in_training and given.training:
            weights_TE = renormalize(scores_TE) if self.renormalize else scores_TE
            return Routing(scored.logits_TE, scored.probs_TE, weights_TE, ids_TK=None, sums_to_one=self.renormalize)
        dropout = given.dropouts["expert_dropout"]
        if dropout > 0:
            scores_TE, kept_TE = torch.native_dropout(scores_TE, dropout, True)
        K = min(self.k, scores_TE.shape[-1])
        # a dropped expert has a score of 0, and only a softmax' scores are never below it
        if scored.bias_E is None and (kept_TE is None or scored.is_softmax):
            weights_TK, ids_TK = scores_TE.topk(K, dim=-1)
        else:
            ranks_TE = scored.scores_TE if scored.bias_E is None else scored.scores_TE + scored.bias_E
            if kept_TE is not None:
                ranks_TE = ranks_TE.masked_fill(~kept_TE, float("-inf"))
            ids_TK = ranks_TE.topk(K, dim=-1).indices
            weights_TK = scores_TE.gather(-1, ids_TK)
        if kept_TE is not None:
            assigned_TK = kept_TE.gather(-1, ids_TK)
        raw_TK = weights_TK
        if self.renormalize and given.num_null > 0:
            weights_TK = renormalize_beside_null(weights_TK, ids_TK >= given.num_experts - given.num_null)
        elif self.renormalize and scored.is_softmax and kept_TE is None:
            # a softmax over its sum is that of the chosen logits alone, whose gradient takes a third of the operations
            weights_TK = scored.logits_TE.gather(-1, ids_TK).softmax(-1)
        elif self.renormalize:
            weights_TK = renormalize(weights_TK)
        if self.straight_through:
            weights_TK = weights_TK.detach() + (raw_TK - raw_TK.detach())
        if not self.multiply_by_gate:
            # times 0, so that the router has a gradient of 0 rather than none, as data-parallel wrappers need
            weights_TK = weights_TK * 0 + (1 if assigned_TK is None else assigned_TK.to(weights_TK.dtype))
        limited = self.has_capacity and (given.training or self.capacity_in_eval)
        if limited:
            weights_TK = weights_TK * within_capacity(
                ids_TK, scores_TE.shape[-1], self.capacity_factor, given.tokens, assigned_TK, self.capacity
            )
        return Routing(
            scored.logits_TE,
            scored.probs_TE,
            weights_TK,
            ids_TK,
            assigned_TK,
            # in gradient too: what a block adds whatever the weights are is else left out
            sums_to_one=(self.renormalize or (self.k == 1 and not self.multiply_by_gate))
            and kept_TE is None
            and not limited
            and not self.straight_through,
        )
