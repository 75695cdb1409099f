"""One expert drawn at random in training, all of them in evaluation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from moelora.choices import register
from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.base import Selection


@register
@dataclass(frozen=True, kw_only=True)
class Draw(Selection):
    """In training one expert for all tokens of a forward, drawn at each site with equal chances; else all by scores.

    As in AdaMix, MixPHM (arXiv 2303.01239) and THOR (arXiv 2110.04260). Processes and micro-batches draw for
    themselves; a layer that gradient checkpointing runs again draws the same.
    """

    kind: ClassVar[str] = "draw"

    @property
    def is_dense(self) -> bool:
        """Always: there is no load to balance."""
        return True

    def select(self, scored: Scored, given: RouterInput) -> Routing:
        """See `Selection.select`."""
        if not given.training:
            return Routing(scored.logits_TE, scored.probs_TE, scored.scores_TE, ids_TK=None)
        drawn = torch.randint(given.num_experts, (1, 1), device=given.x_TD.device)
        ids_T1 = drawn.expand(len(given.x_TD), 1)
        return Routing(scored.logits_TE, scored.probs_TE, torch.ones_like(ids_T1, dtype=torch.float32), ids_T1)
