"""What one balance is taken over.

Shape suffixes: E experts, L mixtures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
        sums: What each expert got, `Routing.sums_2E`, by mixture; empty where nobody reads it.
    """

    counts: Mapping[Mixture, Tensor]
    tokens_L: Tensor
    sums: Mapping[Mixture, Tensor] = field(default_factory=dict)

    @classmethod
    def of(
        cls, records: Sequence[RoutingRecord], mixtures: Mapping[Mixture, int] | None = None, *, sums: bool = True
    ) -> RoutingTotals:
        """Sum up records; several of one mixture (several forwards) are added.

        Args:
            records: The records.
            mixtures: Number of experts of each mixture of the model; None takes those that have a record.
            sums: Whether anybody reads `sums`.
        """
        device = records[0].valid_T.device if records else torch.device("cpu")  # layers may be spread over devices
        if mixtures is None:
            mixtures = {record.mixture: record.num_experts for record in records}
        counts = {mixture: torch.zeros(E, device=device) for mixture, E in mixtures.items()}
        tokens = {mixture: torch.zeros((), device=device) for mixture in mixtures}
        summed = {mixture: torch.zeros(2, E, device=device) for mixture, E in mixtures.items()} if sums else {}
        for record in records:
            if sums:
                sums_2E = record.routing.sums_2E(record.valid_T).detach()
                summed[record.mixture] = summed[record.mixture] + sums_2E.to(device)
            counts[record.mixture] = counts[record.mixture] + record.counts_E().to(device)
            tokens[record.mixture] = tokens[record.mixture] + record.valid_T.sum().to(device)
        return cls(counts, torch.stack(list(tokens.values())) if tokens else torch.zeros(0, device=device), summed)

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        if list(self.counts) != list(other.counts):
            raise ConfigError(f"routing totals of different layers: {list(self.counts)} and {list(other.counts)}.")
        device = other.tokens_L.device
        counts = {mixture: counts_E.to(device) + other.counts[mixture] for mixture, counts_E in self.counts.items()}
        sums = {mixture: sums_2E.to(device) + other.sums[mixture] for mixture, sums_2E in self.sums.items()}
        return RoutingTotals(counts, self.tokens_L.to(device) + other.tokens_L, sums)

    def all_reduce(self, device: torch.device) -> RoutingTotals:
        """The sum over all processes, in one collective.

        Args:
            device: Where this process's model is: a process in which nothing ran has its zeros elsewhere.
        """
        parts = [*self.counts.values(), *self.sums.values(), self.tokens_L]
        flat = torch.cat([part.to(device).flatten() for part in parts])
        if world_size() > 1:
            dist.all_reduce(flat)
        *found, tokens_L = flat.split([part.numel() for part in parts])
        counts = dict(zip(self.counts, found[: len(self.counts)], strict=True))
        sums = {m: f.view(2, -1) for m, f in zip(self.sums, found[len(self.counts) :], strict=True)}
        return RoutingTotals(counts, tokens_L, sums)

    @property
    def num_ran(self) -> Tensor:
        """Number of mixtures that had any valid token, at least 1."""
        return (self.tokens_L > 0).sum().clamp_min(1)
