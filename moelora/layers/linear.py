"""A mixture of LoRA experts, or an ordinary LoRA, on one linear.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from typing import Any

from peft.utils.quantization_utils import quantization_extra_repr
from torch import Tensor, nn

from moelora.layers.base import MoeLoraLayer
from moelora.layers.modules import linear_size, quantization_backend
from moelora.ops import reference
from moelora.ops.mixture_linear import mixture_linear
from moelora.routing.recorder import RoutingRecorder


class MixtureLinear(MoeLoraLayer):
    """`y = W x + scaling * sum_e g_e(x) B_e A_e x`; without a router `y = W x + scaling * B A x`.

    Args:
        base_layer: `nn.Linear`, transformers' `Conv1D`, or a quantised linear that PEFT knows.
        name: Its name in the base model.
        recorder: The model's routing recorder.
    """

    adapter_layer_names = ("moelora_A", "moelora_B", "moelora_router")

    def __init__(self, base_layer: nn.Module, name: str, recorder: RoutingRecorder) -> None:
        super().__init__(base_layer, name, recorder)
        self.quantization_backend: Any = quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = linear_size(self.get_base_layer())

    def linears(self) -> dict[str, tuple[int, int]]:
        """The one linear."""
        return {"": (self.in_features, self.out_features)}

    def router_features(self) -> int:
        """The router reads the linear's input."""
        return self.in_features

    def forward_active(self, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The base output and the sum of the active adapters' deltas."""
        result = self._base(x)
        dtype = result.dtype
        for adapter in self.active_adapters:
            if self.has_adapter(adapter):
                result = self._add(adapter, x, valid_BS, result)
        return result.to(dtype)

    def forward_one(self, adapter: str, x: Tensor, valid_BS: Tensor | None) -> Tensor:
        """The base output and one adapter's delta."""
        result = self._base(x)
        return self._add(adapter, x, valid_BS, result).to(result.dtype)

    def _base(self, x: Tensor) -> Tensor:
        result: Tensor = self.base_layer(x)
        if self.quantization_backend is not None:
            result = self.quantization_backend.maybe_clone_base_result(result)
        return result

    def _add(self, adapter: str, x: Tensor, valid_BS: Tensor | None, result: Tensor) -> Tensor:
        pair = self.pair("", adapter)
        assert pair is not None
        a_ERD, b_EOR = pair
        x_lora = self.moelora_dropout[adapter](self._cast_input_dtype(x, a_ERD.dtype)).reshape(-1, self.in_features)
        result_TO = result.reshape(-1, self.out_features)
        routing = None
        if adapter in self.moelora_router:
            assert valid_BS is not None
            routing = self.route(adapter, x, valid_BS)
        gates_TE = None if routing is None else routing.gates_TE()
        if self.compute[adapter].implementation == "reference":
            y_TO = result_TO + reference.mixture_linear(x_lora, a_ERD, b_EOR, gates_TE, self.scaling[adapter])
        else:
            y_TO = mixture_linear(x_lora, a_ERD, b_EOR, gates_TE, self.scaling[adapter], result_TO)
        if routing is not None and valid_BS is not None:
            y_TO = self.recorder.observe(self, adapter, routing, valid_BS, y_TO)
        return y_TO.view(result.shape)

    def extra_repr(self) -> str:
        """Quantisation, if any."""
        return str(quantization_extra_repr(self))
