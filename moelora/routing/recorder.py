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
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moelora.errors import MoeLoraError
from moelora.routing.decision import Routing

if TYPE_CHECKING:
    from moelora.layers.base import MoeLoraLayer

logger = logging.getLogger(__name__)

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


class RoutingRecorder:
    """Collects `RoutingRecord`s of one model.

    Attributes:
        records: What was recorded since the last `clear`.
        expects_loss: Whether an adapter of the model is configured with a balance loss, which somebody has to add.
    """

    def __init__(self) -> None:
        self.records: list[RoutingRecord] = []
        self.expects_loss = False
        self._listeners = 0
        self._open = False
        self._frozen = False
        self._grad_enabled = False
        self._masks: dict[str, Tensor | None] = {}
        self._armed: dict[tuple[str, str], Callable[[Routing, Tensor], Tensor]] = {}
        self._backward_scale: Tensor | None = None
        self._pending: list[tuple[MoeLoraLayer, str, Tensor]] = []

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
    def listening(self, *, frozen: bool = False) -> Iterator[RoutingRecorder]:
        """Record every forward inside.

        Args:
            frozen: Whether routers' biases stay where they are although the model is in training mode.
        """
        self._listeners += 1
        was_frozen, self._frozen = self._frozen, frozen or self._frozen
        try:
            yield self
        finally:
            self._listeners -= 1
            self._frozen = was_frozen
            if self._listeners == 0:
                self.clear()

    def clear(self) -> None:
        """Forget all records."""
        self.records = []
        self._armed = {}
        self._backward_scale = None

    def before_forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Hook of the base model: open, and note which tokens are padding."""
        self._open = True
        self._grad_enabled = torch.is_grad_enabled()
        if self._grad_enabled or not self._armed:
            # A forward without gradients between a step's forward and its backward (a reference model) must not
            # replace the mask that checkpointing's second run still needs.
            self._masks = _padding_masks(module, kwargs)
        if self.expects_loss and module.training and self._grad_enabled and not self._listeners:
            self.expects_loss = False
            logger.warning(
                "The adapter is configured with a balance loss, but nothing adds it: training goes on without. Use "
                "MoeLoraTrainer, MoeLoraSFTTrainer or MoeLoraTrainerMixin, or add moelora.losses yourself."
            )

    def after_forward(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Hook of the base model: close, and move the routers' biases."""
        self._open = False
        pending, self._pending = self._pending, []
        if pending:
            _update_biases(pending)

    def valid_BS(self, layer: MoeLoraLayer, x: Tensor) -> Tensor:
        """Which of the tokens in `x` [..., D] are not padding, by sequences.

        Without a 2-D mask that fits (packed or padding-free batches, inputs by themselves) every token is valid. Inputs
        of two dimensions [N, D] are N tokens of the batch's sequences if that adds up, else N sequences of one token.
        """
        mask = self._masks.get(layer.stream)
        leading = x.shape[:-1]
        if mask is not None and len(leading) == 2 and mask.shape[0] == leading[0] and mask.shape[1] >= leading[1]:
            return mask[:, mask.shape[1] - leading[1] :].to(x.device)
        if mask is not None and len(leading) == 1 and mask.numel() == leading[0]:
            return mask.to(x.device)
        shape = (leading[0], leading[1:].numel()) if len(leading) > 1 else (leading.numel(), 1)
        return torch.ones(shape, dtype=torch.bool, device=x.device)

    def observe(self, layer: MoeLoraLayer, adapter: str, routing: Routing, valid_BS: Tensor, output: Tensor) -> Tensor:
        """Called by a layer with its decision.

        Returns:
            `output`, with the gradient of the balance loss attached where it cannot reach the router otherwise.
        """
        if self._open:
            if self._listeners:
                self.records.append(
                    RoutingRecord(layer.name, adapter, routing, valid_BS.reshape(-1), self._grad_enabled)
                )
            router = layer.moelora_router[adapter]
            if router.bias is not None and layer.training and self._grad_enabled and not self._frozen:
                load_E = (routing.load_TE() * valid_BS.reshape(-1, 1)).sum(0)
                self._pending.append((layer, adapter, load_E))
            return output
        loss = self._armed.get((layer.name, adapter)) if self._armed and torch.is_grad_enabled() else None
        if loss is None:
            return output
        return _AttachGradient.apply(output, loss(routing, valid_BS.reshape(-1)), self)  # type: ignore[no-any-return]

    def arm(self, record: RoutingRecord, loss: Callable[[Routing, Tensor], Tensor]) -> None:
        """Add the gradient of `loss(routing, valid_T)` when `record`'s layer is run again in the backward pass.

        Raises:
            MoeLoraError: If the layer ran more than once in this step; its runs could not be told apart.
        """
        key = (record.layer, record.adapter)
        if key in self._armed:
            raise MoeLoraError(
                f"layer {record.layer!r} ran more than once before the backward pass, under reentrant gradient "
                "checkpointing; allowed: once. Use gradient_checkpointing_kwargs={'use_reentrant': False}."
            )
        self._armed[key] = loss

    def scale_armed(self, scale: Tensor) -> None:
        """Give the factor by which the total loss is multiplied (accumulation, loss scaling), before the backward."""
        self._backward_scale = scale


class _AttachGradient(torch.autograd.Function):
    """Identity on `output` whose backward also sends a gradient into `loss`, as if it had been added to the total."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, loss: Tensor, recorder: RoutingRecorder) -> Tensor:
        ctx.recorder = recorder
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:  # type: ignore[override]
        scale = ctx.recorder._backward_scale
        if scale is None:
            scale = torch.ones((), device=grad.device)
        return grad, scale.to(device=grad.device, dtype=torch.float32), None


def _update_biases(pending: list[tuple[MoeLoraLayer, str, Tensor]]) -> None:
    """Move the biases of all layers after a training forward, with one sum over the processes."""
    loads = torch.cat([load_E for _, _, load_E in pending])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(loads)
    start = 0
    for layer, adapter, load_E in pending:
        layer.moelora_router[adapter].update_bias(loads[start : start + len(load_E)])
        start += len(load_E)


def _padding_masks(module: nn.Module, kwargs: dict[str, Any]) -> dict[str, Tensor | None]:
    """The 2-D padding masks of a forward: of the model, and of the decoder of an encoder-decoder model."""
    main = _mask_2d(kwargs.get("attention_mask"))
    decoder = main
    if getattr(getattr(module, "config", None), "is_encoder_decoder", False):
        decoder = _mask_2d(kwargs.get("decoder_attention_mask"))
        labels = kwargs.get("labels")
        if decoder is None and isinstance(labels, Tensor) and labels.dim() == 2:
            decoder = labels != -100
    return {"main": main, "decoder": decoder}


def _mask_2d(mask: Any) -> Tensor | None:
    return mask.bool() if isinstance(mask, Tensor) and mask.dim() == 2 else None


def own_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder installed on this very module, or None."""
    return model.__dict__.get(_ATTRIBUTE)


def attach_recorder(model: nn.Module, recorder: RoutingRecorder) -> None:
    """Install a recorder with its two hooks on a base model; nothing if it is there."""
    if own_recorder(model) is recorder:
        return
    model.__dict__[_ATTRIBUTE] = recorder
    model.register_forward_pre_hook(recorder.before_forward, with_kwargs=True)
    model.register_forward_hook(recorder.after_forward, always_call=True)


def detach_recorder(model: nn.Module) -> None:
    """Remove the recorder and its hooks from a base model."""
    recorder = model.__dict__.pop(_ATTRIBUTE, None)
    # found by owner rather than kept as handles, which a deep copy of the model would leave pointing at the original
    for hooks, flags in (
        (model._forward_pre_hooks, model._forward_pre_hooks_with_kwargs),
        (model._forward_hooks, model._forward_hooks_always_called),
    ):
        for key in [key for key, hook in hooks.items() if getattr(hook, "__self__", None) is recorder]:
            del hooks[key]
            flags.pop(key, None)  # type: ignore[attr-defined]


def find_recorder(model: nn.Module) -> RoutingRecorder | None:
    """The recorder of a model that contains a moelora adapter at any depth (PeftModel, DDP, compiled), or None."""
    for module in model.modules():
        recorder = own_recorder(module)
        if recorder is not None:
            return recorder
    return None


@contextmanager
def record_routing(model: nn.Module) -> Iterator[RoutingRecorder]:
    """Record the routing of every forward of `model` inside, in training or evaluation, with or without gradients.

    Args:
        model: A model with a moelora adapter.

    Returns:
        The recorder; read its `records` before leaving, and `clear()` it between forwards to save memory.

    Raises:
        MoeLoraError: If the model has no moelora adapter.
    """
    recorder = find_recorder(model)
    if recorder is None:
        raise MoeLoraError(
            f"{type(model).__name__} has no moelora adapter, so there is no routing to record. "
            "Add one with peft.get_peft_model(model, MoeLoraConfig.from_preset(...))."
        )
    with recorder.listening() as listening:
        yield listening
