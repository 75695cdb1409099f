"""What one balance is taken over.

Shape suffixes: E experts, L mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from moelora.errors import ConfigError
from moelora.routing.record import Mixture, RoutingRecord


def world_size() -> int:
    """Number of data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True, eq=False)
class RoutingTotals:
    """For each mixture of a model the choices of each expert, and the number of valid tokens.

    All processes and micro-batches have the same mixtures in the same order. One that did not run has zeros: the vision
    tower of a model, say, when no row of the micro-batch had an image.

    Attributes:
        counts: Choices that fell on each expert [E], by mixture.
        tokens_L: Number of valid tokens of each mixture.
    """

    counts: Mapping[Mixture, Tensor]
    tokens_L: Tensor

    @classmethod
    def of(cls, records: Sequence[RoutingRecord], mixtures: Mapping[Mixture, int] | None = None) -> RoutingTotals:
        """Sum up records; several of one mixture (several forwards) are added.

        Args:
            records: The records.
            mixtures: Number of experts of each mixture of the model; None takes those that have a record.
        """
        device = records[0].valid_T.device if records else torch.device("cpu")  # layers may be spread over devices
        if mixtures is None:
            mixtures = {record.mixture: record.num_experts for record in records}
        counts = {mixture: torch.zeros(E, device=device) for mixture, E in mixtures.items()}
        tokens = {mixture: torch.zeros((), device=device) for mixture in mixtures}
        for record in records:
            counts[record.mixture] = counts[record.mixture] + record.counts_E().to(device)
            tokens[record.mixture] = tokens[record.mixture] + record.valid_T.sum().to(device)
        return cls(counts, torch.stack(list(tokens.values())) if tokens else torch.zeros(0, device=device))

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        if list(self.counts) != list(other.counts):
            raise ConfigError(f"routing totals of different layers: {list(self.counts)} and {list(other.counts)}.")
        device = other.tokens_L.device
        counts = {mixture: counts_E.to(device) + other.counts[mixture] for mixture, counts_E in self.counts.items()}
        return RoutingTotals(counts, self.tokens_L.to(device) + other.tokens_L)

    def all_reduce(self, device: torch.device) -> RoutingTotals:
        """The sum over all processes, in one collective.

        Args:
            device: Where this process's model is: a process in which nothing ran has its zeros elsewhere.
        """
        flat = torch.cat([counts_E.to(device) for counts_E in (*self.counts.values(), self.tokens_L)])
        if world_size() > 1:
            dist.all_reduce(flat)
        *counts, tokens_L = flat.split([len(counts_E) for counts_E in (*self.counts.values(), self.tokens_L)])
        return RoutingTotals(dict(zip(self.counts, counts, strict=True)), tokens_L)

    @property
    def num_ran(self) -> Tensor:
        """Number of mixtures that had any valid token, at least 1."""
        return (self.tokens_L > 0).sum().clamp_min(1)
