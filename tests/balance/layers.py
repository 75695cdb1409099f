"""Routers of a few layers with the tokens they read, and the losses of their records.

Shape suffixes: T tokens, D input features, L layers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.cv_squared import CvSquaredBalance
from moelora.balance.entropy import EntropyLoss
from moelora.balance.losses import balance_losses
from moelora.balance.mixtral import MixtralBalance
from moelora.balance.switch import SwitchBalance
from moelora.balance.z_loss import ZLoss
from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.routing.record import RoutingRecord
from moelora.scores.base import Scores
from moelora.scores.linear import LinearScores
from moelora.selection.base import Selection
from moelora.selection.dense import Dense
from moelora.selection.learned_threshold import LearnedThreshold, ThresholdBalance
from moelora.selection.top_k import TopK
from tests.routing.routers import BIASED, SOFTMAX, new_router

TOP_2 = TopK(k=2)
SWITCH, MIXTRAL, Z, THRESHOLD = SwitchBalance(), MixtralBalance(), ZLoss(), ThresholdBalance()
ENTROPY, CV_SQUARED = EntropyLoss(), CvSquaredBalance()
ROUTINGS: dict[str, tuple[LinearScores, Selection]] = {
    "top-2": (SOFTMAX, TOP_2),
    "top-1-raw": (SOFTMAX, TopK(k=1, renormalize=False)),
    "dense": (SOFTMAX, Dense()),
    "sigmoid": (BIASED, TOP_2),
    "capacity": (SOFTMAX, TopK(k=2, capacity_factor=0.5, capacity_in_eval=True)),
    "learned-threshold": (SOFTMAX, LearnedThreshold()),
}


def exact(loss: Tensor) -> float:
    """To six digits, as the golden values are."""
    return round(loss.item(), 6)


def record(routing: Routing, valid_T: Tensor | None = None, layer: str = "layer") -> RoutingRecord:
    """A record of a decision; by default every token is valid."""
    every_T = torch.ones(len(routing.probs_TE), dtype=torch.bool)
    return RoutingRecord(layer, "default", routing, every_T if valid_T is None else valid_T)


def loss_of(choice: Balance, *records: RoutingRecord) -> Tensor:
    """One choice's loss of records, without its coefficient."""
    (found,) = balance_losses(records, [choice])
    return found


class Layers:
    """Routers of a few layers and the tokens they read; decisions for any part of the tokens."""

    def __init__(
        self, selection: Selection = TOP_2, scores: Scores = SOFTMAX, *, T: int = 21, E: int = 5, L: int = 3
    ) -> None:
        self.routers = [new_router(selection, scores, num_experts=E) for _ in range(L)]
        for router in self.routers:
            for name, parameter in router.named_parameters():
                if parameter.requires_grad:
                    torch.nn.init.normal_(parameter, std=0.3 if name.startswith("threshold") else 1.0)
        self.x_LTD = torch.randn(L, T, 12)
        self.valid_T = torch.rand(T) < 0.7

    @classmethod
    def routed(cls, name: str, **sizes: int) -> Layers:
        """Layers of one of `ROUTINGS`."""
        scores, selection = ROUTINGS[name]
        return cls(selection, scores, **sizes)

    def records(self, tokens: slice = slice(None), valid_T: Tensor | None = None) -> list[RoutingRecord]:
        """A record of each layer, of some of the tokens."""
        valid_T = self.valid_T[tokens] if valid_T is None else valid_T
        found = []
        for i, router in enumerate(self.routers):
            x_TD = self.x_LTD[i, tokens]
            routing = router(x_TD, Tokens(torch.ones(1, len(x_TD), dtype=torch.bool)))
            found.append(record(routing, valid_T, f"layers.{i}"))
        return found

    def gradients(self, loss: Tensor) -> list[Tensor]:
        """Gradients of all tensors that are trained; 0 of those that a loss does not reach."""
        trained = [p for router in self.routers for p in router.parameters() if p.requires_grad]
        found = torch.autograd.grad(loss, trained, retain_graph=True, allow_unused=True, materialize_grads=True)
        return list(found)
