"""The balance losses of recorded forwards, for training loops of one's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelora.balance.base import Balance
from moelora.balance.totals import RoutingTotals
from moelora.errors import ConfigError
from moelora.routing.record import RoutingRecord
from moelora.routing.stack import stack_records


def balance_losses(
    records: Sequence[RoutingRecord], choices: Sequence[Balance], totals: RoutingTotals | None = None
) -> list[Tensor]:
    """The losses of records, or their share of the losses of something larger.

        balance = model.peft_config["default"].balance
        with moelora.record_routing(model) as recorder:
            loss = model(**batch).loss
        terms = moelora.balance_losses(recorder.records, balance)
        loss = loss + sum(choice.coef * term for choice, term in zip(balance, terms))

    Args:
        records: The records.
        choices: The balance choices of the adapter, `config.balance`.
        totals: Sums over all tokens that the losses are taken over; those of `records` by default.

    Returns:
        A scalar for each choice, without its coefficient; 0 of one that adds no loss.

    Raises:
        ConfigError: If there are no records, or a loss is not one of routing decisions.
    """
    if not records:
        raise ConfigError("no routing records; allowed: at least one. Was the forward run inside `record_routing`?")
    others = [choice.kind for choice in choices if choice.has_loss and choice.reads == "predictions"]
    if others:
        raise ConfigError(
            f"balance has {', '.join(map(repr, others))}, which compares what two forwards predict, so that no record "
            "of one has it; allowed: losses of routing. Use MoeLoraTrainer, or the choice's `compared` of two forwards."
        )
    stacks = stack_records(records)
    totals = totals or RoutingTotals.of(stacks)
    device = totals.tokens_M.device
    losses = []
    for choice in choices:
        if choice.reads == "experts":
            owners = {id(record.run.owner): record.run.owner for record in records if record.run is not None}
            if not owners:
                raise ConfigError(
                    f"balance {choice.kind!r} reads the experts of the model, and the records are of none; allowed: "
                    "records of a forward inside `record_routing`."
                )
            losses.append(expert_loss(choice, [layer for owner in owners.values() for layer in owner.layers], device))
            continue
        if not choice.is_loss:
            losses.append(torch.zeros((), device=device))
            continue
        terms = [
            choice.of_routing(s.routing, s.valid_LT, totals.of_mixtures(s.mixtures, s.valid_LT.device)).sum()
            for s in stacks
        ]
        losses.append(torch.stack([term.to(device) for term in terms]).sum())
    return losses


def expert_loss(choice: Balance, layers: Sequence[Any], device: torch.device) -> Tensor:
    """A loss of the experts' weights: the mean over the linears of a mixture, then over the active mixtures.

    Args:
        choice: One that reads experts.
        layers: The mixture layers of a model.
        device: Where the loss goes.
    """
    terms = []
    for layer in layers:
        for _, adapter in layer.mixtures():
            found = [layer.lora_factors(role, adapter) for role in layer.linear_sizes()]
            own = [choice.of_experts(factors) for factors in found if factors is not None]
            terms.append(torch.stack(own).mean().to(device))
    return torch.stack(terms).mean() if terms else torch.zeros((), device=device)
