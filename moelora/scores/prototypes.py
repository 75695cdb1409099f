"""Scores by a vector of each expert that is not trained with the router: Arrow's prototypes, PHATGOOSE's gates.

Shape suffixes: T tokens, D input features, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import router_logits
from moelora.validation import check, check_bool, is_real


@register
@dataclass(frozen=True, kw_only=True)
class PrototypeScores(Scores):
    """`softmax(z / temperature)` with `z_e = v_e . x`, one vector `v_e` of each expert at each site.

    Arrow (arXiv 2405.11157): `z_e = |v_e . x|`, v_e the first right singular vector of `B_e A_e`. PHATGOOSE (arXiv
    2402.05859): `z_e = std(v_e) . std(x) / sqrt(D)`, v_e a gate that was trained with its expert, std() with mean 0 and
    variance 1 over the features. With a renormalised top-k the weights are the softmax over the chosen z.

    Args:
        absolute: Whether z is the absolute value.
        standardize: Whether v and x are standardised over the features first, and z divided by sqrt(D).
        temperature: Divides z.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "prototypes"

    absolute: bool = False
    standardize: bool = False
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_bool("scores.absolute", self.absolute)
        check_bool("scores.standardize", self.standardize)
        T = self.temperature
        check(is_real(T) and T > 0, "scores.temperature", T, "a positive number")

    @property
    def is_trained(self) -> bool:
        """Never: the vectors are computed, or trained one by one."""
        return False

    @property
    def is_distribution(self) -> bool:
        """Always."""
        return True

    def params(self, site: Site) -> list[Param]:
        """`prototypes` [E, D]."""
        shape = (site.num_experts, site.router_features)
        return [Param("prototypes", shape, Init("zeros"), trainable=False)]

    def score(self, given: RouterInput) -> Scored:
        """See `Scores.score`."""
        x_TD, v_ED = given.x_TD, given.tensors["prototypes"]
        if self.standardize:
            logits_TE = standardized_logits(x_TD, v_ED)
        else:
            logits_TE = router_logits(x_TD, v_ED)
        logits_TE = (logits_TE.abs() if self.absolute else logits_TE) / self.temperature
        probs_TE = logits_TE.softmax(-1)
        return Scored(logits_TE, probs_TE, probs_TE, is_softmax=True)


def standardized_logits(x_TD: Tensor, v_ED: Tensor) -> Tensor:
    """`std(v_e) . std(x) / sqrt(D)` [T, E] in fp32."""
    return router_logits(standardized(x_TD), standardized(v_ED)) / x_TD.shape[-1] ** 0.5


def standardized(x: Tensor) -> Tensor:
    """With mean 0 and variance 1 over the last dimension, in fp32."""
    return F.layer_norm(x.float(), x.shape[-1:])
