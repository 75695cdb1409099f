"""Decisions of many layers as one, so that what is made of them is launched once and not for each layer.

Shape suffixes: L decisions, T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from moelora.routing.batch import Tokens
from moelora.routing.decision import Routing
from moelora.routing.record import Mixture, RoutingRecord


@dataclass(frozen=True, eq=False)
class RoutingStack:
    """Records of equal shape, one after the other along a leading axis.

    Attributes:
        records: The L records.
        routing: Their decisions as one: each of its tensors has the axis L in front, so `probs_TE` is [L, T, E].
        valid_LT: True where a token is not padding.
    """

    records: Sequence[RoutingRecord]
    routing: Routing
    valid_LT: Tensor

    @property
    def mixtures(self) -> list[Mixture]:
        """Whose decisions they are."""
        return [record.mixture for record in self.records]


def stack_records(records: Sequence[RoutingRecord]) -> list[RoutingStack]:
    """All records, in as few stacks as their shapes allow: one where all layers have as many experts."""
    groups: dict[Any, list[RoutingRecord]] = {}
    for record in records:
        groups.setdefault(_shape_of(record.routing), []).append(record)
    return [
        RoutingStack(group, stack_routings([each.routing for each in group]), _stack([each.valid_T for each in group]))
        for group in groups.values()
    ]


def stack_routings(routings: Sequence[Routing]) -> Routing:
    """Decisions of equal shape as one, each of whose tensors has a leading axis."""
    tensors: dict[str, Any] = {}
    for field in fields(routings[0]):
        values = [getattr(routing, field.name) for routing in routings]
        if isinstance(values[0], Tensor):
            tensors[field.name] = _stack(values)
    return replace(routings[0], **tensors)


def _stack(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def _shape_of(routing: Routing) -> Any:
    return type(routing), *(_kind_of(getattr(routing, field.name)) for field in fields(routing))


def _kind_of(value: Any) -> Any:
    if isinstance(value, Tensor):
        # one without a gradient is of a layer that reentrant checkpointing runs again, which is treated apart
        return value.shape, value.dtype, value.device, value.requires_grad
    return value.sequences_key if isinstance(value, Tokens) else value
