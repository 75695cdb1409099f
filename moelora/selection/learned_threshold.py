"""A threshold that each token learns, and the balance loss that goes with it (AdaMoLE).

Shape suffixes: L mixtures, T tokens, D input features, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.choices import Init, Param, Site, register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.scores.linear import router_logits
from moelora.selection.base import Selection, renormalize
from moelora.validation import check, is_real


@dataclass(frozen=True, eq=False, kw_only=True)
class ThresholdRouting(Routing):
    """A decision with the threshold that it was made by.

    Attributes:
        threshold_T1: tau of each token.
    """

    threshold_T1: Tensor


@register
@dataclass(frozen=True, kw_only=True)
class LearnedThreshold(Selection):
    """Every token is sent to the experts whose score passes a threshold of its own (AdaMoLE, arXiv 2405.00361).

        tau = tau_max sigmoid(w_tau x + b_tau),  a_e = p_e - tau,  m_e = 1[a_e >= 0],  w_e = a_e m_e / sum(a m)

    Args:
        max_threshold: tau_max; None is 1 / E, at which at least one expert always passes. With more a token may get
            no expert: a linear then gives the base's output, a feed-forward block 0.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "learned_threshold"

    max_threshold: float | None = None

    def __post_init__(self) -> None:
        tau = self.max_threshold
        check(tau is None or (is_real(tau) and 0 < tau <= 1), "max_threshold", tau, "0 < max_threshold <= 1, or None")

    def check(self, config: Any) -> None:
        """Refuse scores that are not probabilities.

        Raises:
            ConfigError: With the reason.
        """
        if not config.scores.is_distribution:
            raise ConfigError(
                f"selection 'learned_threshold' compares probabilities, and {config.scores.describe()} are none; "
                "allowed: linear scores with activation='softmax' and no bias."
            )

    def params(self, site: Site) -> list[Param]:
        """The linear of the threshold, as `nn.Linear` starts it: weight [1, D] and bias [1, 1].

        The bias has two dimensions since PEFT's LoRA+ gives every tensor of one dimension the rate of B.
        """
        bound = Init("uniform", site.router_features**-0.5)
        return [
            Param("threshold_weight", (1, site.router_features), Init("kaiming")),
            Param("threshold_bias", (1, 1), bound),
        ]

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        scores_TE = scored.scores_TE
        tau_max = 1 / scores_TE.shape[-1] if self.max_threshold is None else self.max_threshold
        logit_T1 = router_logits(given.x_TD, given.tensors["threshold_weight"])
        threshold_T1 = tau_max * (logit_T1 + given.tensors["threshold_bias"].float()).sigmoid()
        margin_TE = scores_TE - threshold_T1
        passed_TE = margin_TE >= 0
        return ThresholdRouting(
            scored.logits_TE,
            scored.probs_TE,
            renormalize(margin_TE * passed_TE),
            ids_TK=None,
            assigned_TK=passed_TE,
            threshold_T1=threshold_T1,
        )


@register
@dataclass(frozen=True, kw_only=True)
class ThresholdBalance(Balance):
    """`E * sum_e (mean_t m_te) (mean_t a_te)` per layer with m_te = 1[a_te >= 0] and a = p - tau (AdaMoLE's code).

    As there, the margin a takes the place of the probability and may be negative (arXiv 2405.00361). Deviations: valid
    tokens only, and the mean over the layers that ran; the code counts padding and sums over the adapted modules.

    Args:
        coef: Coefficient of the loss. 0 switches it off.

    Raises:
        ConfigError: For a negative coefficient.
    """

    kind: ClassVar[str] = "threshold"

    def check(self, config: Any) -> None:
        """Refuse a selection without a threshold.

        Raises:
            ConfigError: With the reason.
        """
        if not isinstance(config.selection, LearnedThreshold):
            raise ConfigError(
                f"balance 'threshold' needs a threshold, which {config.selection.kind!r} selection does not have; "
                "allowed: 'learned_threshold'. Use 'switch'."
            )

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`."""
        assert isinstance(routing, ThresholdRouting)
        margin_sums_LE = ((routing.probs_TE - routing.threshold_T1) * valid_LT.unsqueeze(-1)).sum(-2)
        share_LE = totals.counts_LE * routing.num_experts / totals.tokens_L.clamp_min(1).unsqueeze(-1)
        return (share_LE * margin_sums_LE).sum(-1) / totals.over_L
