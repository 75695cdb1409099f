"""The balance losses of one micro-batch, as its share of those of the optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.balance.base import Balance
from moelora.balance.losses import expert_loss
from moelora.balance.totals import RoutingTotals, world_size
from moelora.config import BalanceScope, MoeLoraConfig
from moelora.errors import ConfigError, MoeLoraError
from moelora.routing.decision import Routing
from moelora.routing.record import LayerLoss, Mixture, ModelRun, RoutingListener, RoutingRecord
from moelora.routing.stack import stack_records, stack_routings


def active_config(model: nn.Module) -> MoeLoraConfig | None:
    """The configuration whose balance the active adapters have.

    Raises:
        ConfigError: If several adapters with different ones are active.
    """
    configs = getattr(model, "peft_config", {})
    active = getattr(model, "active_adapters", [])
    names = active() if callable(active) else active
    names = [names] if isinstance(names, str) else list(names)
    found = [configs[name] for name in names if isinstance(configs.get(name), MoeLoraConfig)]
    settings = [(config.balance, config.balance_scope) for config in found]
    if any(setting != settings[0] for setting in settings):
        raise ConfigError(f"the active adapters {names} have different balance settings: {settings}; they must agree.")
    return found[0] if found else None


class MicroBatchBalance:
    """Works out the share of one micro-batch and attaches its gradient.

    Args:
        listener: Its records are this micro-batch's.
        balance: The choices of balance.
        scope: Which tokens share one balance.
        mixtures: Number of experts of each mixture of the model.
        accumulation: Number of micro-batches of the optimizer step.
        totals: Totals over the whole step and all processes, where they had to be counted beforehand.
        layers: The mixture layers of the model.

    Attributes:
        balance: The losses of routing, added or only logged; none if none is added.
        of_experts: The losses of the experts' weights.
        comparing: The losses that compare what two forwards predict.
        records: The records, once the loss was worked out.
        counted: Their totals, once the loss was worked out.
        values: The losses by the names they are logged as, without coefficients.
        is_added: Whether `add_to` was called.
    """

    def __init__(
        self,
        listener: RoutingListener,
        balance: Sequence[Balance],
        scope: BalanceScope,
        mixtures: Mapping[Mixture, int],
        accumulation: int = 1,
        totals: RoutingTotals | None = None,
        layers: Sequence[Any] = (),
    ) -> None:
        self.listener = listener
        losses = [choice for choice in balance if choice.is_loss]
        of_routing = [choice for choice in losses if choice.reads == "routing"]
        self.balance = of_routing if any(choice.has_loss for choice in of_routing) else []
        self.of_experts = [choice for choice in losses if choice.has_loss and choice.reads == "experts"]
        self.comparing = [choice for choice in losses if choice.has_loss and choice.reads == "predictions"]
        self.layers = layers
        self.scope = scope
        self.mixtures = mixtures
        self.accumulation = accumulation
        self.totals = totals
        self.records: Sequence[RoutingRecord] = []
        self.counted: RoutingTotals | None = None
        self.values: dict[str, Tensor] = {}
        self.is_added = False

    def add_to(self, loss: Tensor, *, divided_later: bool) -> Tensor:
        """The loss with this micro-batch's share of the balance losses.

        Args:
            loss: The trainer's own loss.
            divided_later: Whether the trainer will divide what is returned by the number of micro-batches.
        """
        self.is_added = True
        self.records = list(self.listener.records)
        self.listener.clear()
        stacks = stack_records(self.records)
        sums = any(choice.needs_sums for choice in self.balance)
        self.counted = RoutingTotals.of(stacks, self.mixtures, sums=sums)
        if self.of_experts:
            loss = loss + self._expert_losses(loss.device, divided_later)
        if not self.balance:
            return loss
        totals = self._totals(loss.device)
        factor = self._factor(divided_later)
        attached = torch.zeros((), device=loss.device)
        self.values |= {choice.logged_as: torch.zeros((), device=loss.device) for choice in self.balance}
        repeated: dict[int, ModelRun] = {}
        for stack in stacks:
            terms = self._terms(stack.routing, stack.valid_LT, totals, stack.mixtures)
            for choice, term in zip(self.balance, terms, strict=True):
                self.values[choice.logged_as] = self.values[choice.logged_as] + term.detach().to(loss.device)
            total = self._weighted(terms, factor)
            attached = attached + total.to(loss.device)
            for record in stack.records if not total.requires_grad else ():
                if record.run is not None:
                    record.run.attach_later(record, self._later(totals, record.mixture, factor))
                    repeated[id(record.run)] = record.run
        loss = loss + attached
        if loss.requires_grad:
            for run in repeated.values():
                # whatever the total is multiplied by from here on (accumulation, loss scaling) reaches those layers too
                loss.register_hook(run.set_scale)
        return loss

    def add_compared(
        self, loss: Tensor, sums: Sequence[Tensor], positions: Tensor | int, *, divided_later: bool, of_step: bool
    ) -> Tensor:
        """The loss with this micro-batch's share of the losses that compare two forwards, normalised as the trainer's.

        Args:
            loss: The loss so far.
            sums: Each loss, summed over this micro-batch's positions.
            positions: Number of positions to divide by.
            divided_later: As in `add_to`.
            of_step: Whether these are the positions of the whole optimizer step, over all processes; else each
                micro-batch counts the same.
        """
        parts = self.accumulation * world_size()
        for choice, sum_ in zip(self.comparing, sums, strict=True):
            share = sum_ / torch.as_tensor(positions, device=sum_.device).clamp(min=1) / (1 if of_step else parts)
            self.values[choice.logged_as] = share.detach() / self.value_weight
            # data parallelism averages the gradients
            loss = loss + choice.coef * share.to(loss.device) * (parts if divided_later else world_size())
        return loss

    def _expert_losses(self, device: torch.device, divided_later: bool) -> Tensor:
        """The share of the losses of the experts' weights: the same for each micro-batch and process."""
        total, pieces = torch.zeros((), device=device), self.accumulation * world_size()
        for choice in self.of_experts:
            share = expert_loss(choice, self.layers, device) / (pieces if self.scope == "global" else 1)
            self.values[choice.logged_as] = share.detach()
            total = total + self._factor(divided_later) * choice.coef * share
        return total

    def check_attached(self) -> None:
        """Refuse a backward pass that left balance losses without a gradient; to be called after it.

        Raises:
            MoeLoraError: If layers whose forward ran without gradients were not run again.
        """
        left = [mixture for record in self.records if record.run is not None for mixture in record.run.losses]
        if left:
            raise MoeLoraError(
                f"layer {left[0][0]!r} ran without gradients in the forward and was not run again by transformers' "
                "gradient checkpointing, so its balance loss has no gradient; allowed: "
                "model.gradient_checkpointing_enable(), or none. Set balance_coef=0 to train without the loss."
            )

    @property
    def adds_any(self) -> bool:
        """Whether there is a loss to add."""
        return bool(self.balance or self.of_experts or self.comparing)

    @property
    def value_weight(self) -> float:
        """What this micro-batch's values count for in the step's, summed over micro-batches and processes."""
        return 1.0 if self.scope == "global" else 1.0 / (self.accumulation * world_size())

    def _weighted(self, terms: Sequence[Tensor], factor: float) -> Tensor:
        weighted = [choice.coef * term for choice, term in zip(self.balance, terms, strict=True)]
        return factor * torch.stack(weighted).sum()

    def _terms(
        self, routing: Routing, valid_LT: Tensor, totals: RoutingTotals, mixtures: Sequence[Mixture]
    ) -> list[Tensor]:
        """The share of some mixtures in each loss."""
        own = totals.of_mixtures(mixtures, valid_LT.device)
        return [choice.of_routing(routing, valid_LT, own).sum() for choice in self.balance]

    def _later(self, totals: RoutingTotals, mixture: Mixture, factor: float) -> LayerLoss:
        def loss(routing: Routing, valid_T: Tensor) -> Tensor:
            terms = self._terms(stack_routings([routing]), valid_T.unsqueeze(0), totals, [mixture])
            return self._weighted(terms, factor)

        return loss

    def _totals(self, device: torch.device) -> RoutingTotals:
        if self.totals is not None:
            return self.totals
        assert self.counted is not None
        return self.counted.all_reduce(device) if self.scope == "global" else self.counted

    def _factor(self, divided_later: bool) -> float:
        if self.scope == "global":
            # shares add up over micro-batches and processes; data parallelism averages the gradients
            return world_size() * (self.accumulation if divided_later else 1)
        return 1.0 if divided_later else 1.0 / self.accumulation
