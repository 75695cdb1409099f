"""What is kept of routing decisions, and only while somebody listens: for the balance loss, metrics, reports."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from moelora.errors import MoeLoraError
from moelora.routing.decision import Routing

LayerLoss = Callable[[Routing, Tensor], Tensor]
"""A share of a loss, of one layer's decision and valid_T."""

Mixture = tuple[str, str]
"""Name of a layer and of an adapter."""


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """One mixture's decision in one forward.

    Attributes:
        layer: Name of the wrapped module in the base model, e.g. "model.layers.0.mlp".
        adapter: Name of the adapter.
        routing: The decision for T tokens.
        valid_T: True where a token is not padding.
        run: The forward it was made in.
    """

    layer: str
    adapter: str
    routing: Routing
    valid_T: Tensor
    run: ModelRun | None = None

    @property
    def mixture(self) -> Mixture:
        """What tells this mixture from the others: layer and adapter."""
        return self.layer, self.adapter

    @property
    def grad_enabled(self) -> bool:
        """Whether the model's forward was run with gradients."""
        return self.run is None or self.run.grad_enabled

    @property
    def num_experts(self) -> int:
        """E."""
        return self.routing.num_experts

    def counts_E(self) -> Tensor:
        """Choices of valid tokens that fell on each expert, fp32, without gradient."""
        return self.routing.counts_E(self.valid_T)

    def load_E(self) -> Tensor:
        """The same as shares that sum to 1."""
        counts_E = self.counts_E()
        return counts_E / counts_E.sum().clamp_min(1e-9)

    @property
    def valid_tokens(self) -> int:
        """Number of valid tokens (waits for the device)."""
        return int(self.valid_T.sum())


@dataclass(frozen=True, eq=False)
class RoutingListener:
    """What one listener hears.

    Attributes:
        records: What was recorded since the last `clear`.
        gradients_only: Whether forwards without gradients are left out.
    """

    records: list[RoutingRecord] = field(default_factory=list)
    gradients_only: bool = False

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()


@dataclass(frozen=True, eq=False)
class Decided:
    """What a router that serves sites of one input has decided last, and for what.

    Attributes:
        router: The router.
        place: Where it was: another one each time that a layer is run again.
        x: The input, and the number of changes in place that it had seen.
        routing: The decision.
    """

    router: Any
    place: Any
    x: tuple[Tensor, int]
    routing: Routing


@dataclass(eq=False)
class ModelRun:
    """One forward of a model, from its outermost entry to its end, and its repetition by gradient checkpointing.

    Attributes:
        owner: What opened it; tells the runs of different models apart.
        listeners: Who records it.
        grad_enabled: Whether it runs with gradients.
        biases: The routers' biases that it used, since they move when it ends.
        moving: The decisions of mixtures whose bias moves when it ends.
        losses: Losses whose gradient a repeated layer has to add; see `attach_later`.
        scale: The factor of those losses.
        decisions: Those that every layer of the run shares, since they look at the batch alone.
        latest: The last decision of each adapter whose routers serve sites of one input.
    """

    owner: Any
    listeners: tuple[RoutingListener, ...]
    grad_enabled: bool
    biases: dict[Mixture, Tensor] = field(default_factory=dict)
    moving: list[RoutingRecord] = field(default_factory=list)
    losses: dict[Mixture, LayerLoss] = field(default_factory=dict)
    scale: Tensor | None = None
    decisions: dict[Any, Routing] = field(default_factory=dict)
    latest: dict[str, Decided] = field(default_factory=dict)

    def once(self, adapter: str, router: Any, place: Any, x: Tensor, decide: Callable[[], Routing]) -> Routing:
        """The router's decision if its last one was for this very input, at this place; else a new one."""
        last, version = self.latest.get(adapter), 0 if x.is_inference() else x._version
        known = last is not None and last.router is router and last.place is place and last.x[0] is x
        if last is not None and known and last.x[1] == version:
            return last.routing
        routing = decide()
        self.latest[adapter] = Decided(router, place, (x, version), routing)
        return routing

    def record(self, layer: str, adapter: str, routing: Routing, valid_T: Tensor, *, moves_bias: bool) -> None:
        """Hand a decision to the listeners, and keep it to the end of the run if it moves a bias."""
        for listener in self.listeners:
            if self.grad_enabled or not listener.gradients_only:
                listener.records.append(RoutingRecord(layer, adapter, routing, valid_T, self))
        if moves_bias:
            # without the run: the two would keep each other, and the decisions, until the garbage collector comes
            self.moving.append(RoutingRecord(layer, adapter, routing, valid_T))

    def attach_later(self, record: RoutingRecord, loss: LayerLoss) -> None:
        """Add the gradient of `loss(routing, valid_T)` when the record's layer is run again in the backward pass.

        Under **reentrant** checkpointing the forward runs without gradients, so that a record carries no graph.

        Raises:
            MoeLoraError: If the layer ran more than once in this forward; its runs could not be told apart.
        """
        if record.mixture in self.losses:
            raise MoeLoraError(
                f"layer {record.layer!r} ran more than once in a forward, under reentrant gradient checkpointing; "
                "allowed: once. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self.losses[record.mixture] = loss

    def set_scale(self, scale: Tensor) -> None:
        """Give the factor by which the total loss is multiplied (accumulation, loss scaling), before the backward."""
        self.scale = scale

    def attach(self, mixture: Mixture, routing: Routing, valid_T: Tensor, output: Tensor) -> Tensor:
        """Of a repeated layer: its output, with the gradient of its loss attached if it has one to add."""
        loss = self.losses.pop(mixture, None)
        return output if loss is None else _AttachGradient.apply(output, loss(routing, valid_T), self)


class _AttachGradient(torch.autograd.Function):
    """Identity on `output` whose backward also sends a gradient into `loss`, as if it had been added to the total."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, run: ModelRun) -> Tensor:
        ctx.run = run
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.run.scale
        if scale is None:
            scale = torch.ones((), device=grad.device)
        return grad, scale.to(device=grad.device, dtype=torch.float32), None
