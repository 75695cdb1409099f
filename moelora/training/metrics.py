"""How the experts are used during training: gathered without waiting for the device, read out at each log."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from moelora.balance.totals import world_size
from moelora.routing.record import Mixture
from moelora.training.micro_batch import MicroBatchBalance


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
    """Sums of the experts' load and of the balance losses since the last log.

    Args:
        mixtures: Number of experts of each mixture that is measured: the same on every process, whatever ran there.
        device: Where to sum.
    """

    def __init__(self, mixtures: Mapping[Mixture, int], device: torch.device) -> None:
        self.mixtures = dict(mixtures)
        self.device = device
        self._clear()

    def _clear(self) -> None:
        self._counts_ME = torch.zeros(len(self.mixtures), max(self.mixtures.values(), default=0), device=self.device)
        self._values: dict[str, Tensor] = {}
        self._steps = 0.0

    @property
    def empty(self) -> bool:
        """Whether nothing was added since the last log."""
        return self._steps == 0

    def add(self, step: MicroBatchBalance) -> None:
        """Add one micro-batch."""
        if self.mixtures and step.counted is not None:
            self._counts_ME += step.counted.counts_ME.to(self.device)
        for name, value in step.values.items():
            seen = self._values.get(name, torch.zeros((), device=self.device))
            self._values[name] = seen + value.to(self.device) * step.value_weight
        self._steps += 1 / step.accumulation

    def pop(self) -> tuple[dict[str, float], dict[str, float]]:
        """Read out and start again; every process must call it.

        Returns:
            A summary for the log (`balance_loss`, `z_loss`, `expert_load/busiest`, `expert_load/entropy`: means over
            the layers that ran; `expert_load/dead`: the sum), and the same for each layer, whether it ran or not
            (`expert_load/<layer>/busiest`, ...; with several active adapters `expert_load/<layer>/<adapter>/busiest`).
        """
        flat = torch.cat([value.reshape(-1) for value in (*self._values.values(), self._counts_ME)])
        if world_size() > 1:
            dist.all_reduce(flat)
        values, counts_ME = flat.cpu().split([len(self._values), self._counts_ME.numel()])
        rows = zip(counts_ME.view(self._counts_ME.shape), self.mixtures.values(), strict=True)
        counts = [row_E[:E] for row_E, E in rows]
        one_adapter = len({adapter for _, adapter in self.mixtures}) == 1
        names = [layer if one_adapter else f"{layer}/{adapter}" for layer, adapter in self.mixtures]
        by_layer = {name: load_metrics(counts_E) for name, counts_E in zip(names, counts, strict=True)}
        ran = [metrics for metrics, counts_E in zip(by_layer.values(), counts, strict=True) if counts_E.any()]
        summary = dict(zip(self._values, (values / self._steps).tolist(), strict=True))
        for name in ("busiest", "entropy", "dead"):
            values_of = [metrics[name] for metrics in ran]
            if ran:
                summary[f"expert_load/{name}"] = sum(values_of) / (1 if name == "dead" else len(ran))
        layers = {
            f"expert_load/{layer}/{name}": value for layer, found in by_layer.items() for name, value in found.items()
        }
        self._clear()
        return summary, layers
