"""A mixture of LoRA experts, or an ordinary LoRA, on one linear."""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from moelora.layers.base import Here, MoeLoraLayer
from moelora.layers.modules import dense_weight, linear_size, quantization_backend
from moelora.ops.feed_forward_parts import Dense


class MixtureLinear(MoeLoraLayer):
    """`y = W x + scaling * sum_e g_e(x) B_e A_e x`; without a router `y = W x + scaling * B A x`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear that PEFT knows.
        name: Its name in the base model.
    """

    def __init__(self, base_layer: nn.Module, name: str) -> None:
        super().__init__(base_layer, name)
        self.quantization_backend: Any = quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = linear_size(self.get_base_layer())

    def linear_sizes(self) -> dict[str, tuple[int, int]]:
        """The one linear."""
        return {"": (self.in_features, self.out_features)}

    def dense(self) -> Dense:
        """See `MoeLoraLayer.dense`."""
        return {"": dense_weight(self.get_base_layer())}

    def forward_active(self, x: Tensor, here: Here | None) -> Tensor:
        """The base output and the sum of the active adapters' deltas."""
        adapters = [adapter for adapter in self.active_adapters if self.has_adapter(adapter)]
        if not all(map(self.is_low_rank, adapters)):
            return self.sum_of_changes(adapters, x, here)
        result = self._base(x)
        dtype = result.dtype
        for adapter in adapters:
            result = self._add(adapter, x, here, result)
        return result.to(dtype)

    def forward_one(self, adapter: str, x: Tensor, here: Here | None) -> Tensor:
        """The base output and one adapter's delta, or what its experts make of it."""
        if self.is_off(adapter):
            return self._base(x)
        if not self.is_low_rank(adapter):
            return self.forward_applied(adapter, x, here, self._base)
        result = self._base(x)
        return self._add(adapter, x, here, result).to(result.dtype)

    def _base(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result

    def _add(self, adapter: str, x: Tensor, here: Here | None, result: Tensor) -> Tensor:
        if self.is_off(adapter):
            return result
        factors = self.lora_factors("", adapter)
        assert factors is not None
        x_lora = self._cast_input_dtype(x, factors.a_ERD.dtype)
        dropout: Any = self.moelora_dropout[adapter]
        routing = None
        if adapter in self.routers:
            assert here is not None
            routing = self.route(adapter, x, here)
        y_TO = self.configs[adapter].compute.linear(
            x_lora.reshape(-1, self.in_features),
            factors,
            None if routing is None else factors.all_gates(routing.gates_TE()),
            result.reshape(-1, self.out_features),
            separate=routing is not None and routing.separate,
            p=dropout.p if dropout.training else 0.0,
        )
        if routing is not None and here is not None:
            y_TO = self.report_routing(adapter, routing, here, y_TO)
        return y_TO.view(result.shape)

    def extra_repr(self) -> str:
        """Quantisation, if any."""
        return str(quantization_extra_repr(self))
