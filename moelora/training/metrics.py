"""How the experts are used during training: gathered without waiting for the device, read out at each log."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from moelora.routing.recorder import Mixture
from moelora.training.balance import MicroBatchBalance, world_size


def load_metrics(counts_E: Tensor) -> dict[str, float]:
    """Metrics of one mixture's load.

    Args:
        counts_E: Choices that fell on each expert.

    Returns:
        "busiest": share of the busiest expert (1/E at balance). "entropy": entropy of the shares over that of perfect
        balance (1 at balance, 0 if one expert gets everything). "dead": number of experts that got nothing.
    """
    load_E = counts_E / counts_E.sum().clamp_min(1e-9)
    entropy = -(load_E * load_E.clamp_min(1e-12).log()).sum() / math.log(max(len(load_E), 2))
    return {
        "busiest": load_E.max().item(),
        "entropy": entropy.item(),
        "dead": float((counts_E == 0).sum().item()),
    }


class RoutingMetrics:
    """Sums of the experts' load and of the balance losses since the last log."""

    def __init__(self) -> None:
        self._counts: dict[Mixture, Tensor] = {}
        self._losses: Tensor | None = None
        self._steps = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last log."""
        return not self._counts

    def add(self, step: MicroBatchBalance) -> None:
        """Add one micro-batch."""
        for record in step.records:
            counts_E = record.counts_E()
            seen = self._counts.get(record.mixture)
            self._counts[record.mixture] = counts_E if seen is None else seen + counts_E
        if step.balance_loss is not None and step.z_loss is not None:
            losses = torch.stack([step.balance_loss, step.z_loss]) * step.value_weight
            self._losses = losses if self._losses is None else self._losses + losses
        self._steps += 1 / step.accumulation

    def pop(self) -> tuple[dict[str, float], dict[str, float]]:
        """Read out and start again; every process must call it.

        Returns:
            A summary for the log (`balance_loss`, `z_loss`, `expert_load/busiest`, `expert_load/entropy`: means over
            the layers; `expert_load/dead`: the sum), and the same for each layer (`expert_load/<layer>/busiest`, ...;
            with several active adapters `expert_load/<layer>/<adapter>/busiest`, ...).
        """
        device = next(iter(self._counts.values())).device
        losses = torch.zeros(2, device=device) if self._losses is None else self._losses.to(device)
        flat = torch.cat([losses, *(counts.to(device) for counts in self._counts.values())])
        if world_size() > 1:
            dist.all_reduce(flat)
        flat = flat.cpu()
        sizes = [len(counts) for counts in self._counts.values()]
        losses, *counts = flat.split([2, *sizes])
        one_adapter = len({adapter for _, adapter in self._counts}) == 1
        names = [layer if one_adapter else f"{layer}/{adapter}" for layer, adapter in self._counts]
        by_layer = {name: load_metrics(counts_E) for name, counts_E in zip(names, counts, strict=True)}
        summary: dict[str, float] = {}
        if self._losses is not None:
            summary["balance_loss"], summary["z_loss"] = (losses / self._steps).tolist()
        for name in ("busiest", "entropy", "dead"):
            values = [metrics[name] for metrics in by_layer.values()]
            summary[f"expert_load/{name}"] = sum(values) if name == "dead" else sum(values) / len(values)
        layers = {
            f"expert_load/{layer}/{name}": value for layer, found in by_layer.items() for name, value in found.items()
        }
        self.__init__()  # type: ignore[misc]
        return summary, layers
