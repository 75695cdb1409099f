"""A mixture of whole feed-forward experts around a frozen feed-forward block.

Shape suffixes: T tokens, D model features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import ConfigError
from moelora.layers.base import MoeLoraLayer
from moelora.layers.modules import FeedForwardForm, linear_size, quantization_backend
from moelora.ops import reference
from moelora.ops.mixture_feed_forward import FeedForwardExperts, FrozenFeedForward, mixture_feed_forward
from moelora.routing.decision import Routing
from moelora.routing.recorder import RoutingRecorder
from moelora.routing.router import Router


class MixtureFeedForward(MoeLoraLayer):
    """`y = sum_k w_k E_{e_k}(x)` with experts that are the whole block plus LoRAs of their own (MixLoRA).

    Several active adapters add what each changes: `base(x) + sum_a (y_a - base(x))`.

    Args:
        base_layer: The frozen block.
        name: Its name in the base model.
        recorder: The model's routing recorder.
        form: Which child of the block plays which part.
    """

    adapter_layer_names = (
        "moelora_gate_A",
        "moelora_gate_B",
        "moelora_up_A",
        "moelora_up_B",
        "moelora_down_A",
        "moelora_down_B",
        "moelora_router",
    )

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder, form: FeedForwardForm) -> None:
        super().__init__(base_layer, name, recorder)
        self.form = form

    def linear(self, role: str) -> nn.Module:
        """The frozen linear of a role."""
        return self.base_layer.get_submodule(self.form.linears[role])

    def linears(self) -> dict[str, tuple[int, int]]:
        """Sizes of "up", "down" and, in a gated block, "gate"."""
        return {role: linear_size(self.linear(role)) for role in self.form.linears}

    def router_features(self) -> int:
        """The router reads the block's input."""
        return self.linears()["up"][0]

    def forward_active(self, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The mixture of the active adapter; of several, the base and the sum of their changes."""
        adapters = [adapter for adapter in self.active_adapters if self.has_adapter(adapter)]
        outputs = [self.forward_one(adapter, x, valid_BS) for adapter in adapters]
        if len(outputs) == 1:
            return outputs[0]
        base = self.base_output(x)
        return base + torch.stack([output - base for output in outputs]).sum(0)

    def forward_one(self, adapter: str, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The mixture of one adapter."""
        assert valid_BS is not None
        routing = self.route(adapter, x, valid_BS)
        x_TD = x.reshape(-1, x.shape[-1])
        implementation = self.compute[adapter].implementation
        if implementation == "reference":
            y_TD = self._reference(x_TD, routing, self._frozen(), self._experts(adapter))
        else:
            compiled = implementation == "compiled"
            y_TD = mixture_feed_forward(x_TD, routing, self._frozen(), self._experts(adapter), compiled=compiled)
        y_TD = self.recorder.observe(self, adapter, routing, valid_BS, y_TD)
        return y_TD.view(*x.shape[:-1], y_TD.shape[-1])

    def _frozen(self) -> FrozenFeedForward:
        form, block = self.form, self.base_layer
        down = self.linear("down")

        def child(name: str | None) -> Any:
            return None if name is None else getattr(block, name)

        return FrozenFeedForward(
            kind=form.kind,
            up=self.linear("up"),
            down=lambda hidden: down(_to_weight_dtype(hidden, down)),
            gate=child(form.gate),
            activation=child(form.activation),
            down_bias=getattr(down, "bias", None),
            hidden_dropout=_if_active(child(form.hidden_dropout)),
            output_dropout=_if_active(child(form.output_dropout)),
        )

    def _experts(self, adapter: str) -> FeedForwardExperts:
        router: Router = self.moelora_router[adapter]  # type: ignore[assignment]
        routing = router.config
        dropping = routing.capacity_factor is not None or routing.expert_dropout > 0
        return FeedForwardExperts(
            up=self.pair("up", adapter),
            down=self.pair("down", adapter),
            gate=self.pair("gate", adapter),
            scaling=self.scaling[adapter],
            dropout=_if_active(self.moelora_dropout[adapter]),
            weights_sum_to_one=routing.renormalize and not dropping,
        )

    def _reference(
        self, x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: FeedForwardExperts
    ) -> Tensor:
        """The oracle on this layer's tensors."""
        dropouts = [found for found in (block.hidden_dropout, block.output_dropout, experts.dropout) if found]
        if dropouts:
            raise ConfigError(
                f"compute.implementation is 'reference' and {self.name!r} trains with {dropouts[0]}; allowed: no "
                "dropout. The reference draws none; set lora_dropout=0 or use 'fast'."
            )
        linears = {role: _dense_weight(self.linear(role)) for role in self.form.linears}
        pairs = {"up": experts.up, "down": experts.down, "gate": experts.gate}
        loras = {role: pair for role, pair in pairs.items() if pair is not None}
        y_TD = reference.mixture_feed_forward(
            x_TD, routing.gates_TE(), linears, loras, block.kind, block.activation, experts.scaling
        )
        return y_TD.to(x_TD.dtype)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        return super()._get_base_layer_device_and_dtype(self.linear("up"))


def _if_active(dropout: Any) -> Any:
    """A dropout where it does anything, else None."""
    return dropout if isinstance(dropout, nn.Dropout) and dropout.training and dropout.p > 0 else None


def _to_weight_dtype(x: Tensor, linear: nn.Module) -> Tensor:
    """T5 keeps the down projection in fp32 in half-precision models; the block casts its input, and so do we."""
    weight = getattr(linear, "weight", None)
    if not isinstance(weight, Tensor) or weight.dtype not in (torch.float32, torch.float64):
        return x
    return x if torch.is_autocast_enabled(x.device.type) else x.to(weight.dtype)


def _dense_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a frozen linear, in `nn.Linear`'s layout."""
    from transformers.pytorch_utils import Conv1D

    bias: Tensor | None = getattr(linear, "bias", None)
    if quantization_backend(linear) is not None:
        # by its effect, since 4-bit weights may be packed for a kernel in a way that cannot be dequantised
        with torch.no_grad():
            columns: Tensor = linear(torch.eye(linear_size(linear)[0], device=next(linear.parameters()).device))
        return (columns if bias is None else columns - bias).t(), bias
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return (weight.t() if isinstance(linear, Conv1D) else weight), bias
