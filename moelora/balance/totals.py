"""What one balance is taken over.

Shape suffixes: M mixtures of a model, L of these, E experts: the most that any of them has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from moelora.errors import ConfigError
from moelora.routing.record import Mixture
from moelora.routing.stack import RoutingStack


def world_size() -> int:
    """Number of data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


@dataclass(frozen=True, eq=False)
class RoutingTotals:
    """For each mixture of a model the choices of each expert, and the number of valid tokens.

    All processes and micro-batches have the same mixtures in the same order. One that did not run has zeros: the vision
    tower of a model, say, when no row of the micro-batch had an image.

    Attributes:
        mixtures: Number of experts of each mixture; of one that has fewer than E, what is past them is 0.
        counts_ME: Choices that fell on each expert.
        tokens_M: Number of valid tokens.
        sums_M2E: What each expert got, `Routing.sums_2E`; None where nobody reads it.
    """

    mixtures: Mapping[Mixture, int]
    counts_ME: Tensor
    tokens_M: Tensor
    sums_M2E: Tensor | None

    @classmethod
    def of(
        cls, stacks: Sequence[RoutingStack], mixtures: Mapping[Mixture, int] | None = None, *, sums: bool = True
    ) -> RoutingTotals:
        """Sum up records; several of one mixture (several forwards) are added.

        Args:
            stacks: The records, by `stack_records`.
            mixtures: Number of experts of each mixture of the model; None takes those that have a record.
            sums: Whether anybody reads `sums_M2E`.
        """
        device = stacks[0].valid_LT.device if stacks else torch.device("cpu")  # layers may be spread over devices
        if mixtures is None:
            mixtures = {mixture: stack.routing.num_experts for stack in stacks for mixture in stack.mixtures}
        M, E = len(mixtures), max([0, *mixtures.values()])
        totals = cls(
            mixtures,
            torch.zeros(M, E, device=device),
            torch.zeros(M, device=device),
            torch.zeros(M, 2, E, device=device) if sums else None,
        )
        for stack in stacks:
            valid_LT, at_L = stack.valid_LT, totals._index(stack.mixtures)
            missing = (0, E - stack.routing.num_experts)
            totals.tokens_M.index_add_(0, at_L, valid_LT.sum(-1).to(device, torch.float32))
            totals.counts_ME.index_add_(0, at_L, F.pad(stack.routing.counts_E(valid_LT).to(device), missing))
            if totals.sums_M2E is not None:
                sums_L2E = stack.routing.sums_2E(valid_LT).detach()
                totals.sums_M2E.index_add_(0, at_L, F.pad(sums_L2E.to(device), missing))
        return totals

    def _index(self, mixtures: Sequence[Mixture]) -> Tensor:
        known = {mixture: index for index, mixture in enumerate(self.mixtures)}
        # not blocking: the host is not to wait for what the device has still to do
        return torch.tensor([known[each] for each in mixtures]).to(self.tokens_M.device, non_blocking=True)

    def __add__(self, other: RoutingTotals) -> RoutingTotals:
        if list(self.mixtures) != list(other.mixtures):
            raise ConfigError(f"routing totals of different layers: {list(self.mixtures)} and {list(other.mixtures)}.")
        device, sums_M2E = other.tokens_M.device, None
        if self.sums_M2E is not None and other.sums_M2E is not None:
            sums_M2E = self.sums_M2E.to(device) + other.sums_M2E
        counts_ME, tokens_M = self.counts_ME.to(device) + other.counts_ME, self.tokens_M.to(device) + other.tokens_M
        return RoutingTotals(other.mixtures, counts_ME, tokens_M, sums_M2E)

    def all_reduce(self, device: torch.device) -> RoutingTotals:
        """The sum over all processes, in one collective.

        Args:
            device: Where this process's model is: a process in which nothing ran has its zeros elsewhere.
        """
        if world_size() == 1:
            return self
        parts = [part for part in (self.counts_ME, self.tokens_M, self.sums_M2E) if part is not None]
        flat = torch.cat([part.to(device).flatten() for part in parts])
        dist.all_reduce(flat)
        found = [part.view(old.shape) for part, old in zip(flat.split([p.numel() for p in parts]), parts, strict=True)]
        return RoutingTotals(self.mixtures, found[0], found[1], found[2] if len(found) == 3 else None)

    def of_mixtures(self, mixtures: Sequence[Mixture], device: torch.device) -> MixtureTotals:
        """Those of some mixtures, which have as many experts.

        Args:
            mixtures: L of them, perhaps one several times.
            device: Where their decisions are.
        """
        at_L, E = self._index(mixtures), self.mixtures[mixtures[0]]
        counts_LE, tokens_L = self.counts_ME[at_L, :E].to(device), self.tokens_M[at_L].to(device)
        sums_L2E = None if self.sums_M2E is None else self.sums_M2E[at_L, :, :E].to(device)
        return MixtureTotals(counts_LE, tokens_L, sums_L2E, self)

    @property
    def num_ran(self) -> Tensor:
        """Number of mixtures that had any valid token, at least 1."""
        return (self.tokens_M > 0).sum().clamp_min(1)


@dataclass(frozen=True, eq=False)
class MixtureTotals:
    """The totals of L mixtures, which have E experts each.

    Attributes:
        counts_LE, tokens_L, sums_L2E: As in `RoutingTotals`.
        model: Those of all mixtures.
    """

    counts_LE: Tensor
    tokens_L: Tensor
    sums_L2E: Tensor | None
    model: RoutingTotals

    @property
    def over_L(self) -> Tensor:
        """What a sum over tokens is divided by, for the mean over a mixture's tokens and then the mixtures that ran."""
        return self.tokens_L.clamp_min(1) * self.model.num_ran.to(self.tokens_L.device)
