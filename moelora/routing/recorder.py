"""How routing decisions get from the layers to those who want them: the balance loss, metrics, reports.

One recorder a model; the layers hold a reference to it. It keeps decisions only while somebody listens and only during
a forward of the model itself: layers that gradient checkpointing runs again in the backward pass find it closed.

Two ways lead to a balance gradient:

- normally a record carries the graph of the router's probabilities, and the loss is an ordinary function of them;
- under **reentrant** checkpointing the forward runs without gradients and records carry no graph. Once the trainer has
  worked out the loss it calls `arm`, and the layer's second run, in the backward pass, adds the gradient there.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelora.errors import MoeLoraError
from moelora.routing.decision import Routing
from moelora.routing.masks import PaddingMasks

if TYPE_CHECKING:
    from moelora.layers.base import MoeLoraLayer
    from moelora.routing.router import Router

logger = logging.getLogger(__name__)

LayerLoss = Callable[[Routing, Tensor], Tensor]
"""A share of a loss, of one layer's decision and valid_T."""

Mixture = tuple[str, str]
"""Name of a layer and of an adapter."""

_ATTRIBUTE = "_moelora_recorder"


@dataclass(frozen=True, eq=False)
class RoutingRecord:
    """One mixture's decision in one forward.

    Attributes:
        layer: Name of the wrapped module in the base model, e.g. "model.layers.0.mlp".
        adapter: Name of the adapter.
        routing: The decision for T tokens.
        valid_T: True where a token is not padding.
        grad_enabled: Whether the model's forward was run with gradients.
    """

    layer: str
    adapter: str
    routing: Routing
    valid_T: Tensor
    grad_enabled: bool = True

    @property
    def mixture(self) -> Mixture:
        """What tells this mixture from the others: layer and adapter."""
        return self.layer, self.adapter

    @property
    def num_experts(self) -> int:
        """E."""
        return self.routing.num_experts

    def counts_E(self) -> Tensor:
        """Choices of valid tokens that fell on each expert, fp32, without gradient."""
        return (self.routing.load_TE() * self.valid_T.unsqueeze(-1)).sum(0)

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
        frozen: Whether routers' biases stay where they are although the model is in training mode.
    """

    records: list[RoutingRecord] = field(default_factory=list)
    gradients_only: bool = False
    frozen: bool = False

    def clear(self) -> None:
        """Forget all records."""
        self.records.clear()


class RoutingRecorder:
    """Hands the `RoutingRecord`s of one model to its listeners, and knows the padding of the running forward.

    With gradient checkpointing a layer's second run, in the backward pass, must route as the first did, so the masks
    and the routers' biases of a forward stay known until the next one with gradients.

    Attributes:
        expects_loss: Whether an adapter of the model is configured with a balance loss, which somebody has to add.
    """

    def __init__(self) -> None:
        self.expects_loss = False
        self._listeners: list[RoutingListener] = []
        self._open = False
        self._grad_enabled = False
        self._running: PaddingMasks | None = None
        self._last = PaddingMasks()
        self._armed: dict[Mixture, LayerLoss] = {}
        self._backward_scale: Tensor | None = None
        self._pending: list[tuple[Router, Tensor]] = []
        self._moved: list[Router] = []
        self._recomputed: set[Mixture] = set()
        self._earlier_forward = False

    def __deepcopy__(self, memo: dict[int, Any]) -> RoutingRecorder:
        copy = type(self)()
        copy.expects_loss = self.expects_loss
        memo[id(self)] = copy
        return copy

    def __getstate__(self) -> dict[str, Any]:
        return {"expects_loss": self.expects_loss}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]
        self.__dict__.update(state)

    @contextmanager
    def listening(self, *, gradients_only: bool = False, frozen: bool = False) -> Iterator[RoutingListener]:
        """Record every forward inside.

        Args:
            gradients_only: Whether to leave out forwards without gradients.
            frozen: Whether routers' biases stay where they are although the model is in training mode.
        """
        listener = RoutingListener(gradients_only=gradients_only, frozen=frozen)
        self._listeners.append(listener)
        try:
            yield listener
        finally:
            self._listeners.remove(listener)

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the base model: open, and note which tokens are padding."""
        self._open = True
        self._grad_enabled = torch.is_grad_enabled()
        self._running = PaddingMasks.of_forward(module, args, kwargs)
        if not self._grad_enabled:
            return
        self._last = self._running
        for router in self._moved:
            router.bias_of_last_forward = None
        self._moved = []
        self._earlier_forward = not self._recomputed
        self._recomputed = set()
        if self.expects_loss and module.training and not self._listeners:
            self.expects_loss = False
            _say_that_nobody_adds_the_loss()

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the base model, called after a failure too: close, and move the routers' biases."""
        self._open = False
        self._running = None
        pending, self._pending = self._pending, []
        if pending and output is not None:
            _update_biases(pending)
            self._moved = [router for router, _ in pending]

    def before_encoder(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the encoder, which `generate` calls by itself."""
        if not self._open:
            self._running = PaddingMasks.of_forward(module, args, kwargs)

    def after_encoder(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the encoder: note its output, which layers of the decoder read."""
        if not self._open:
            self._running = None
        elif self._running is not None and output is not None:
            self._running = self._running.with_encoded(output)
            if self._grad_enabled:
                self._last = self._running

    def valid_BS(self, layer: MoeLoraLayer, x: Tensor) -> Tensor:
        """Which of the tokens in `x` [..., D] are not padding, by sequences; see `PaddingMasks.valid_BS`."""
        masks = self._running
        if masks is None:
            masks = self._last if torch.is_grad_enabled() else PaddingMasks()
        return masks.valid_BS(layer.stream, x)

    def observe(self, layer: MoeLoraLayer, adapter: str, routing: Routing, valid_BS: Tensor, output: Tensor) -> Tensor:
        """Called by a layer with its decision.

        Returns:
            `output`, with the gradient of the balance loss attached where it cannot reach the router otherwise.

        Raises:
            MoeLoraError: If checkpointing runs the layer again for an earlier forward than the last, whose routing
                cannot be repeated.
        """
        router: Router = layer.moelora_router[adapter]  # type: ignore[assignment]
        if self._open:
            valid_T = valid_BS.reshape(-1)
            for listener in self._listeners:
                if self._grad_enabled or not listener.gradients_only:
                    record = RoutingRecord(layer.name, adapter, routing, valid_T, self._grad_enabled)
                    listener.records.append(record)
            frozen = not self._grad_enabled or any(listener.frozen for listener in self._listeners)
            if router.bias is not None and layer.training and not frozen:
                self._pending.append((router, (routing.load_TE() * valid_T.unsqueeze(-1)).sum(0)))
            return output
        if not torch.is_grad_enabled():
            return output
        self._check_repeatable(layer, adapter, router)
        loss = self._armed.get((layer.name, adapter))
        if loss is None:
            return output
        return _AttachGradient.apply(output, loss(routing, valid_BS.reshape(-1)), self)

    def _check_repeatable(self, layer: MoeLoraLayer, adapter: str, router: Router) -> None:
        key = (layer.name, adapter)
        depends_on_forward = router.bias is not None or router.config.capacity_factor is not None
        if key in self._recomputed and self._earlier_forward and layer.training and depends_on_forward:
            raise MoeLoraError(
                f"layer {layer.name!r} was run by several forwards before the backward pass, with gradient "
                "checkpointing and routing that depends on the forward (a capacity or a moving bias); allowed: one "
                "forward a backward pass. Turn gradient checkpointing off, or put the inputs into one batch."
            )
        self._recomputed.add(key)

    def arm(self, record: RoutingRecord, loss: LayerLoss) -> None:
        """Add the gradient of `loss(routing, valid_T)` when `record`'s layer is run again in the backward pass.

        Raises:
            MoeLoraError: If the layer ran more than once in this step; its runs could not be told apart.
        """
        if record.mixture in self._armed:
            raise MoeLoraError(
                f"layer {record.layer!r} ran more than once before the backward pass, under reentrant gradient "
                "checkpointing; allowed: once. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._armed[record.mixture] = loss

    def scale_armed(self, scale: Tensor) -> None:
        """Give the factor by which the total loss is multiplied (accumulation, loss scaling), before the backward."""
        self._backward_scale = scale

    def disarm(self) -> None:
        """Forget what `arm` and `scale_armed` were given; to be called after the backward pass."""
        self._armed = {}
        self._backward_scale = None


# torch.compile runs it for real while tracing, instead of breaking the graph at a logger
@torch.compiler.assume_constant_result
def _say_that_nobody_adds_the_loss() -> bool:
    logger.warning(
        "The adapter is configured with a balance loss, but nothing adds it: training goes on without. Use "
        "MoeLoraTrainer, MoeLoraSFTTrainer or MoeLoraTrainerMixin, or add moelora.losses yourself."
    )
    return True


class _AttachGradient(torch.autograd.Function):
    """Identity on `output` whose backward also sends a gradient into `loss`, as if it had been added to the total."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, recorder: RoutingRecorder) -> Tensor:
        ctx.recorder = recorder
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        scale = ctx.recorder._backward_scale
        if scale is None:
            scale = torch.ones((), device=grad.device)
        return grad, scale.to(device=grad.device, dtype=torch.float32), None


def _update_biases(pending: list[tuple[Router, Tensor]]) -> None:
    """Move the biases of all layers after a training forward, with one sum over the processes."""
    loads = torch.cat([load_E for _, load_E in pending])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads)
    for (router, _), load_E in zip(pending, loads.split([len(load_E) for _, load_E in pending]), strict=True):
        router.update_bias(load_E)


def own_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder installed on this very module, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def attach_recorder(model: nn.Module, recorder: RoutingRecorder) -> None:
    """Install a recorder with its hooks on a base model and its encoder, if it has one; nothing if it is there."""
    if own_recorder(model) is recorder:
        return
    model.__dict__[_ATTRIBUTE] = recorder
    model.register_forward_pre_hook(recorder.before_forward, with_kwargs=True)
    model.register_forward_hook(recorder.after_forward, always_call=True)
    encoder = _encoder(model)
    if encoder is not None:
        encoder.register_forward_pre_hook(recorder.before_encoder, with_kwargs=True)
        encoder.register_forward_hook(recorder.after_encoder, always_call=True)


def detach_recorder(model: nn.Module) -> None:
    """Remove the recorder and its hooks from a base model."""
    recorder = model.__dict__.pop(_ATTRIBUTE, None)
    for module in filter(None, (model, _encoder(model))):
        # found by owner, not kept as handles, which a deep copy of the model would leave pointing at the original
        for hooks, flags in (
            (module._forward_pre_hooks, module._forward_pre_hooks_with_kwargs),
            (module._forward_hooks, module._forward_hooks_always_called),
        ):
            for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is recorder]:
                del hooks[key]
                flags.pop(key, None)


def _encoder(model: nn.Module) -> nn.Module | None:
    """The encoder of an encoder-decoder model."""
    get_encoder = getattr(model, "get_encoder", None)
    if get_encoder is None or not getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return None
    encoder = get_encoder()
    return encoder if isinstance(encoder, nn.Module) and encoder is not model else None


def find_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder of a model that contains a moelora adapter at any depth (PeftModel, DDP, compiled), or None."""
    for module in model.modules():
        recorder = own_recorder(module)
        if recorder is not None:
            return recorder
    return None


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingListener]:
    """Record the routing of every forward of `model` inside, in training or evaluation, with or without gradients.

    Args:
        model: A model with a moelora adapter.

    Returns:
        A listener; read its `records`, and `clear()` it between forwards to save memory.

    Raises:
        MoeLoraError: If the model has no moelora adapter.
    """
    recorder = find_recorder(model)
    if recorder is None:
        raise MoeLoraError(
            f"{type(model).__name__} has no moelora adapter, so there is no routing to record. "
            "Add one with peft.get_peft_model(model, MoeLoraConfig.from_preset(...))."
        )
    with recorder.listening() as listener:
        yield listener
