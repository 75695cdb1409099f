"""Top-k whose k grows while it is trained (SMoE-Dropout).

Shape suffixes: T tokens, E experts, K the most experts that a token is sent to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from moelora.choices import Init, Param, Site, register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection, renormalize
from moelora.validation import check, check_bool, is_count


@register
@dataclass(frozen=True, kw_only=True)
class GrowingTopK(Selection):
    """Every token is sent to the experts of the highest scores: to `k` at first, to all at the end of the training.

    In between their number is `round(k + (E - k) p)`, p the share of the steps that are done (SMoE-Dropout, arXiv
    2303.01610, where the router is random and frozen: the preset `random_router`). p is saved with the adapter, which
    so computes later what it did when it was saved, and can be set for more or fewer experts; moelora's trainers set it
    before each step by the step that they are at, also after a resumption. Other trainers leave it as it is.

    Args:
        k: Number of experts of a token at first.
        renormalize: Whether the weights of the chosen experts are divided by their sum.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "growing_top_k"

    k: int = 2
    renormalize: bool = True

    def __post_init__(self) -> None:
        check(is_count(self.k), "top_k", self.k, "an integer of at least 1")
        check_bool("selection.renormalize", self.renormalize)

    def check(self, config: Any) -> None:
        """Refuse more choices than experts.

        Raises:
            ConfigError: With the reason.
        """
        fewest = config.experts.fewest
        check(self.k <= fewest, "top_k", self.k, f"1 to num_experts ({fewest})", "Lower top_k or raise num_experts.")

    def params(self, site: Site) -> list[Param]:
        """`progress` [1, 1], p, in fp32."""
        return [Param("progress", (1, 1), Init("zeros"), trainable=False, dtype=torch.float32)]

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        E = scored.scores_TE.shape[-1]
        weights_TK, ids_TK = scored.scores_TE.sort(dim=-1, descending=True, stable=True)
        first = min(self.k, E)
        # kept on the device: reading it back would wait for an accelerator
        count = (first + (E - first) * given.tensors["progress"].clamp(0, 1)).round()
        kept_TK = (torch.arange(E, device=count.device) < count).expand_as(weights_TK)
        weights_TK = weights_TK * kept_TK
        if self.renormalize:
            weights_TK = renormalize(weights_TK, scored.is_softmax)
        return Routing(scored.logits_TE, scored.probs_TE, weights_TK, ids_TK, kept_TK, sums_to_one=self.renormalize)
