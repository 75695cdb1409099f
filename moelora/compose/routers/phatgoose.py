"""PHATGOOSE: a gate of each expert, trained with the expert alone.

Shape suffixes: T tokens, D input features, E experts, N sequences.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from moelora.choices import register
from moelora.compose.routers.base import Composition, RouterRecipe, check_top_k, top_k_of
from moelora.compose.tokens import batches
from moelora.errors import ComposeError
from moelora.progress import track
from moelora.routing.run import batch_facts
from moelora.scores.base import RouterInput, Scored, Scores
from moelora.scores.linear import router_logits
from moelora.selection.dense import Dense
from moelora.validation import check, is_count, is_real


@dataclass(frozen=True, kw_only=True)
class _TrainedGate(Scores):
    """`sigmoid(v_e . x)` for the sequence's own expert, 0 for the others: how a gate is trained."""

    kind: ClassVar[str] = "phatgoose_training"

    def score(self, given: RouterInput) -> Scored:
        logits_TE = router_logits(given.x_TD, given.tensors["prototypes"])
        own_TE = nn.functional.one_hot(given.tokens.fact_T("task_ids").long(), given.num_experts)
        gates_TE = logits_TE.sigmoid() * own_TE
        return Scored(logits_TE, gates_TE, gates_TE, is_softmax=False)


@register
@dataclass(frozen=True, kw_only=True)
class Phatgoose(RouterRecipe):
    """PHATGOOSE (arXiv 2402.05859): each expert's gate learns, on the expert's own rows, which tokens it is good for.

        training: y = W x + sigmoid(v_e . x) B_e A_e x,  v_e starts at 0, expert and base frozen
        routing:  z_e = std(v_e) . std(x) / sqrt(D), softmax over the top k

    The gates of all experts are trained side by side, a batch of each expert's rows in a step; since each sees its own
    rows only and Adam works by element, that is the same as one after the other.

    Args:
        top_k: Experts of a token; None is 2, or all where there are fewer.
        steps: Training steps.
        learning_rate: Of Adam.
        batch_size: Rows of each expert in a step.
    """

    kind: ClassVar[str] = "phatgoose"
    needs_examples: ClassVar[bool] = True
    reads_examples: ClassVar[bool] = True

    top_k: int | None = None
    steps: int = 100
    learning_rate: float = 5e-3
    batch_size: int = 4

    def __post_init__(self) -> None:
        check_top_k(self.top_k)
        for name in ("steps", "batch_size"):
            check(is_count(getattr(self, name)), f"router.{name}", getattr(self, name), "an integer of at least 1")
        rate = self.learning_rate
        check(is_real(rate) and rate > 0, "router.learning_rate", rate, "a positive number")

    def axes(self, num_experts: int, base: Any) -> dict[str, Any]:
        """Standardised prototypes, the top k of them.

        Raises:
            ComposeError: If `top_k` is above the number of experts.
        """
        return {
            "scores": {"kind": "prototypes", "standardize": True},
            "selection": {"kind": "top_k", "k": top_k_of(self.kind, self.top_k, 2, num_experts)},
        }

    def fit(self, composition: Composition) -> None:
        """Train the gates.

        Raises:
            ComposeError: If a row has no answer to learn from.
        """
        for name in composition.names:
            if not all(any(label != -100 for label in row.get("labels", ())) for row in composition.examples[name]):
                raise ComposeError(
                    f"the router {self.kind!r} learns from answers, and a row of {name!r} has none; allowed: rows with "
                    "prompt and completion, or messages."
                )
        routers = [layer.routers[composition.adapter] for layer in composition.layers()]
        before = [(router.scores, router.selection) for router in routers]
        gates = [router.get_parameter("prototypes") for router in routers]
        trained = [p for p in composition.model.parameters() if p.requires_grad]
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            for router, gate in zip(routers, gates, strict=True):
                router.scores, router.selection = _TrainedGate(), Dense()
                gate.requires_grad_(True)
            self._train(composition, gates)
        finally:
            for router, gate, (scores, selection) in zip(routers, gates, before, strict=True):
                router.scores, router.selection = scores, selection
                gate.requires_grad_(False)
                gate.grad = None
            for parameter in trained:
                parameter.requires_grad_(True)

    def _train(self, composition: Composition, gates: list[nn.Parameter]) -> None:
        optimizer = torch.optim.Adam(gates, lr=self.learning_rate)
        device = composition.model.device
        streams = [
            itertools.cycle(list(batches(composition.examples[name], self.batch_size, device)))
            for name in composition.names
        ]
        for _ in track(range(self.steps), "training gates"):
            for number, stream in enumerate(streams):
                batch = next(stream)
                with batch_facts(task_ids=[number] * len(batch["input_ids"])):
                    composition.model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
