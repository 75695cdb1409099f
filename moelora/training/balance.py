"""The balance losses of one micro-batch, as its share of those of the optimizer step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelora.config import BalanceConfig, MoeLoraConfig
from moelora.errors import ConfigError
from moelora.losses import RoutingTotals, layer_losses
from moelora.routing.decision import Routing
from moelora.routing.recorder import LayerLoss, RoutingListener, RoutingRecord, RoutingRecorder


def active_balance(model: nn.Module) -> BalanceConfig:
    """The balance configuration of the active adapter.

    Raises:
        ConfigError: If several adapters with different ones are active.
    """
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else list(names)
    found = [configs[name].balance for name in names if isinstance(configs.get(name), MoeLoraConfig)]
    if any(config != found[0] for config in found):
        raise ConfigError(f"the active adapters {names} have different balance settings: {found}; they must agree.")
    return found[0] if found else BalanceConfig()


def world_size() -> int:
    """Number of data-parallel processes."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class MicroBatchBalance:
    """Works out the share of one micro-batch and attaches its gradient.

    Args:
        recorder: The model's recorder.
        listener: Its records are this micro-batch's.
        config: The balance configuration.
        accumulation: Number of micro-batches of the optimizer step.
        totals: Totals over the whole step and all processes, where they had to be counted beforehand.
    """

    def __init__(
        self,
        recorder: RoutingRecorder,
        listener: RoutingListener,
        config: BalanceConfig,
        accumulation: int,
        totals: RoutingTotals | None,
    ) -> None:
        self.recorder = recorder
        self.listener = listener
        self.config = config
        self.accumulation = accumulation
        self.totals = totals
        self.records: Sequence[RoutingRecord] = []
        self.balance_loss: Tensor | None = None
        self.z_loss: Tensor | None = None

    def add_to(self, loss: Tensor, *, divided_later: bool) -> Tensor:
        """The loss with this micro-batch's share of the balance losses.

        Args:
            loss: The trainer's own loss.
            divided_later: Whether the trainer will divide what is returned by the number of micro-batches.
        """
        self.records = list(self.listener.records)
        self.listener.clear()
        if not self.records or not self.config.enabled:
            return loss
        losses = layer_losses(self._totals(), self.config)
        factor = self._factor(divided_later)
        attached = torch.zeros((), device=loss.device)
        values = torch.zeros(2, device=loss.device)
        armed = False
        for record in self.records:
            share, z_share = losses[record.mixture]
            terms = share(record.routing, record.valid_T), z_share(record.routing, record.valid_T)
            values = values + torch.stack([term.detach().to(loss.device) for term in terms])
            total = factor * (self.config.coef * terms[0] + self.config.z_loss_coef * terms[1])
            attached = attached + total.to(loss.device)
            if not total.requires_grad:
                self.recorder.arm(record, self._armed_loss(share, z_share, factor))
                armed = True
        self.balance_loss, self.z_loss = values.unbind()
        loss = loss + attached
        if armed and loss.requires_grad:
            # whatever the total is multiplied by from here on (accumulation, loss scaling) reaches the armed layers too
            loss.register_hook(self.recorder.scale_armed)
        return loss

    @property
    def value_weight(self) -> float:
        """What this micro-batch's values count for in the step's, summed over micro-batches and processes."""
        return 1.0 if self.config.scope == "global" else 1.0 / (self.accumulation * world_size())

    def _totals(self) -> RoutingTotals:
        if self.totals is not None:
            return self.totals
        totals = RoutingTotals.of(self.records)
        return totals.all_reduce() if self.config.scope == "global" and world_size() > 1 else totals

    def _factor(self, divided_later: bool) -> float:
        if self.config.scope == "global":
            # shares add up over micro-batches and processes; data parallelism averages the gradients
            return world_size() * (self.accumulation if divided_later else 1)
        return 1.0 if divided_later else 1.0 / self.accumulation

    def _armed_loss(self, share: LayerLoss, z_share: LayerLoss, factor: float) -> LayerLoss:
        coef, z_coef = self.config.coef, self.config.z_loss_coef

        def loss(routing: Routing, valid_T: Tensor) -> Tensor:
            return factor * (coef * share(routing, valid_T) + z_coef * z_share(routing, valid_T))

        return loss
