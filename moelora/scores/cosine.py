"""Scores by the angle between a token and each expert, on a sphere of few dimensions.

Shape suffixes: T tokens, D input features, F features of the sphere, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import Activation, router_logits
from moelora.validation import check, check_choice, is_count, is_real

_SHARPEST = 100.0
"""What the cosines are multiplied by at most, as in Tutel: a temperature of 0.01."""


@register
@dataclass(frozen=True, kw_only=True)
class CosineScores(Scores):
    """`z_e = cos(P x, c_e) / tau`, then a softmax or a sigmoid (X-MoE, arXiv 2204.09179).

    The projection P to few features, the experts' places c_e and the temperature tau are learned. Logits are bounded
    by 1 / tau, and the length of a token says nothing, which keeps its representation from gathering around the
    experts.

    Args:
        features: F. The paper takes half the number of experts, Tutel 256; 32 is ours.
        temperature: tau at the start; it does not fall below 0.01, as in Tutel. 0.3 is the paper's for a softmax.
        activation: "softmax" over the experts, or an independent "sigmoid" for each.

    Deviations: checked against the formula of Tutel's `CosineTopKGate`, whose projection has a bias too, and with whose
    N(0, 0.01) the c_e start; here tau is `temperature / exp(t)` with t starting at 0.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "cosine"

    features: int = 32
    temperature: float = 0.3
    activation: Activation = "softmax"

    def __post_init__(self) -> None:
        check(is_count(self.features), "scores.features", self.features, "an integer of at least 1")
        tau = self.temperature
        check(is_real(tau) and tau >= 1 / _SHARPEST, "scores.temperature", tau, "a number of at least 0.01")
        check_choice("scores.activation", self.activation, Activation)

    @property
    def is_trained(self) -> bool:
        """Always."""
        return True

    @property
    def is_distribution(self) -> bool:
        """With a softmax."""
        return self.activation == "softmax"

    def params(self, site: Site) -> list[Param]:
        """`projection` [F, D], `weight` [E, F], and `log_scale` [1, 1].

        That has two dimensions since PEFT's LoRA+ gives every tensor of one dimension the rate of B.
        """
        return [
            Param("projection", (self.features, site.router_features), Init("kaiming")),
            Param("weight", (site.num_experts, self.features), Init("normal", 0.01)),
            Param("log_scale", (1, 1), Init("zeros")),
        ]

    def new_rows(self, name: str, old: Tensor, count: int) -> Tensor | None:
        """The middle of the old places."""
        return F.normalize(old, dim=-1).mean(0, keepdim=True).expand(count, -1) if name == "weight" else None

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        p_TF = router_logits(given.x_TD, given.tensors["projection"])
        with no_autocast(p_TF.device):
            cosines_TE = F.linear(F.normalize(p_TF, dim=-1), F.normalize(given.tensors["weight"].float(), dim=-1))
            scale = (given.tensors["log_scale"].float().exp() / self.temperature).clamp_max(_SHARPEST)
            logits_TE = cosines_TE * scale
        if self.activation == "softmax":
            probs_TE = logits_TE.softmax(-1)
            return Scored(logits_TE, probs_TE, probs_TE, is_softmax=True)
        scores_TE = logits_TE.sigmoid()
        return Scored(logits_TE, scores_TE / scores_TE.sum(-1, keepdim=True), scores_TE, is_softmax=False)
