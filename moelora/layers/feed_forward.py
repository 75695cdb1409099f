"""A mixture of whole feed-forward experts around a frozen feed-forward block.

Shape suffixes: T tokens, D model features.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora.autocast import autocast_dtype
from moelora.layers.base import Here, MoeLoraLayer
from moelora.layers.modules import FeedForwardForm, dense_weight, linear_size
from moelora.ops.feed_forward_parts import Dense, FeedForwardExperts, FrozenFeedForward


class MixtureFeedForward(MoeLoraLayer):
    """`y = sum_k w_k E_{e_k}(x)` with experts that are the whole block plus LoRAs of their own (MixLoRA).

    Several active adapters add what each changes: `base(x) + sum_a (y_a - base(x))`.

    Args:
        base_layer: The frozen block.
        name: Its name in the base model.
        form: Which child of the block plays which part.
    """

    def __init__(self, base_layer: nn.Module, name: str, form: FeedForwardForm) -> None:
        super().__init__(base_layer, name)
        self.form = form

    def linear(self, role: str) -> nn.Module:
        """The frozen linear of a role."""
        return self.base_layer.get_submodule(self.form.linears[role])

    def activation(self) -> nn.Module:
        """The block's activation."""
        return self.base_layer.get_submodule(self.form.activation)

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """Sizes of "up", "down" and, in a gated block, "gate"."""
        return {role: linear_size(self.linear(role)) for role in self.form.linears}

    def dense(self) -> Dense:
        """See `MoeLoraLayer.dense`."""
        return {role: dense_weight(self.linear(role)) for role in self.form.linears}

    def forward_active(self, x: Tensor, here: Here | None) -> Tensor:
        """The mixture of the active adapter; of several, the base and the sum of their changes."""
        return self.sum_of_changes([a for a in self.active_adapters if self.has_adapter(a)], x, here)

    def forward_one(self, adapter: str, x: Tensor, here: Here | None) -> Tensor:
        """The mixture of one adapter."""
        if self.is_off(adapter):
            return self.base_output(x)
        if not self.is_low_rank(adapter):
            return self.forward_applied(adapter, x, here, self.base_output)
        assert here is not None
        routing = self.route(adapter, x, here)
        compute = self.configs[adapter].compute
        operation = compute.feed_forward_linears if self.sites[adapter].by_linear else compute.feed_forward
        y_TD = operation(x.reshape(-1, x.shape[-1]), routing, self.frozen_block(), self._experts(adapter))
        y_TD = self.report_routing(adapter, routing, here, y_TD)
        return y_TD.view(*x.shape[:-1], y_TD.shape[-1])

    def frozen_block(self) -> FrozenFeedForward:
        """See `MoeLoraLayer.frozen_block`."""
        form, block = self.form, self.base_layer
        down = self.linear("down")

        def child(name: str | None) -> Any:
            return None if name is None else getattr(block, name)

        return FrozenFeedForward(
            kind=form.kind,
            up=self.linear("up"),
            down=lambda hidden: down(_to_weight_dtype(hidden, down)),
            gate=child(form.gate),
            activation=self.activation(),
            down_bias=getattr(down, "bias", None),
            hidden_dropout=_if_active(child(form.hidden_dropout)),
            output_dropout=_if_active(child(form.output_dropout)),
            dense=self.dense,
        )

    def _experts(self, adapter: str) -> FeedForwardExperts:
        return FeedForwardExperts(
            up=self.lora_factors("up", adapter),
            down=self.lora_factors("down", adapter),
            gate=self.lora_factors("gate", adapter),
            dropout=_if_active(self.moelora_dropout[adapter]),
        )

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
    return x if autocast_dtype(x.device) is not None else x.to(weight.dtype)
