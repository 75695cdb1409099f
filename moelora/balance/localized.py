"""The localised balancing constraint of LoRAMoE.

Shape suffixes: L mixtures, T tokens, N sequences, E experts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import MixtureTotals
from moelora.choices import register
from moelora.errors import ConfigError
from moelora.routing.decision import Routing
from moelora.validation import check, is_index, is_share


@register
@dataclass(frozen=True, kw_only=True)
class LocalizedBalance(Balance):
    """`CV^2(I * Q)` per layer (LoRAMoE, arXiv 2312.09979, official code), then the mean over the layers that ran.

        Q_ne = sum of p_te over the valid tokens of sequence n,   CV^2 = var / (mean^2 + 1e-10) over all n and e
        I_ne = 1 + delta if the half that e is in is the one of n's task, else 1 - delta

    with the unbiased variance. It is 0 where `I * Q` is the same everywhere, not 1. Tasks are the fact `task_ids` of a
    batch, in training only.

    **It is not linear in the tokens**, so that its value depends on how an optimizer step is cut: each micro-batch of
    each process is balanced by itself, and the loss is their mean, weighted by their valid tokens. Under gradient
    accumulation or data parallelism the sequences of different micro-batches are not compared with each other. With
    one sequence in a micro-batch only its experts are.

    Args:
        coef: Coefficient of the loss. 0 switches it off.
        delta: See above.
        first_tasks: The tasks of the first half of the experts (the first E / 2, rounded up); all others are those of
            the second.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "localized"

    delta: float = 0.1
    first_tasks: list[int] = field(default_factory=lambda: [1])

    def __post_init__(self) -> None:
        super().__post_init__()
        check(is_share(self.delta), "balance.delta", self.delta, "0 <= delta < 1")
        given = self.first_tasks
        good = isinstance(given, (list, tuple)) and all(map(is_index, given))
        check(good, "balance.first_tasks", given, "a list of numbers of tasks")
        object.__setattr__(self, "first_tasks", list(given))

    @property
    def needs(self) -> frozenset[str]:
        """`task_ids`, unless it is off."""
        return frozenset({"task_ids"}) if self.has_loss else frozenset()

    def check(self, config: Any) -> None:
        """Refuse another selection than a dense one of probabilities.

        Raises:
            ConfigError: With the reason.
        """
        check(
            config.selection.kind == "dense" and config.scores.is_distribution,
            "selection",
            config.selection.describe(),
            "'dense', and scores that are a softmax, with 'localized' balance",
            "It compares the probabilities that a sequence gives to all experts.",
        )

    def of_routing(self, routing: Routing, valid_LT: Tensor, totals: MixtureTotals) -> Tensor:
        """See `Balance.of_routing`; here of whole micro-batches, see above.

        Raises:
            ConfigError: For a batch without tasks.
        """
        tokens = routing.tokens
        if tokens is None or not tokens.has_fact("task_ids"):
            raise ConfigError(
                "the balance 'localized' goes by the task of each sequence, and the batch has no task_ids; "
                "allowed: one number for each sequence. Put them in a column `task_ids` of the training data, use "
                "`with moelora.batch_facts(task_ids=...)` around the forward, or set balance_coef=0."
            )
        ids_N, sequence_T = tokens.fact_N("task_ids"), tokens.sequence_T()
        weighted_LTE = routing.probs_TE * valid_LT.unsqueeze(-1)
        L, N, E = len(valid_LT), len(ids_N), routing.num_experts
        usage_LNE = weighted_LTE.new_zeros(L, N, E).index_add(1, sequence_T, weighted_LTE)
        first_N = torch.isin(ids_N, torch.tensor(self.first_tasks, device=ids_N.device))
        first_E = torch.arange(E, device=ids_N.device) < E / 2
        sign_NE = torch.where(first_N.unsqueeze(-1) == first_E, 1.0, -1.0)
        counted_LN = usage_LNE.new_zeros(L, N).index_add(1, sequence_T, valid_LT.to(usage_LNE.dtype)) > 0
        share_L = valid_LT.sum(-1) / totals.over_L
        return share_L * _squared_variation(usage_LNE * (1 + self.delta * sign_NE), counted_LN)


def _squared_variation(values_LNE: Tensor, counted_LN: Tensor) -> Tensor:
    """`var / (mean^2 + 1e-10)` [L] over the rows that count; the others are rows of padding, of zeros."""
    count_L = counted_LN.sum(-1) * values_LNE.shape[-1]
    mean_L = values_LNE.sum((-2, -1)) / count_L.clamp_min(1)
    squares_L = ((values_LNE - mean_L[:, None, None]) * counted_LN.unsqueeze(-1)).square().sum((-2, -1))
    return squares_L / (count_L - 1).clamp_min(1) / (mean_L.square() + 1e-10)
