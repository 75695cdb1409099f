"""What layers and plans need to know about modules of a base model, without knowing their classes.

Wrapped or not, linear or activation, what size; and which child of a feed-forward block plays which part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, NoReturn

import torch
from peft.tuners.tuners_utils import _get_in_out_features
from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn

from moelora.errors import TargetError

Kind = Literal["gated", "plain", "fused"]


@dataclass(frozen=True)
class FeedForwardForm:
    """Which child of a block plays which part.

    Attributes:
        kind: "gated", "plain" or "fused".
        up, down, gate: Names of the linears.
        activation: Name of the activation.
        hidden_dropout: Name of a dropout between activation and `down`.
        output_dropout: Name of a dropout behind `down`.
    """

    kind: Kind
    up: str
    down: str
    activation: str
    gate: str | None = None
    hidden_dropout: str | None = None
    output_dropout: str | None = None

    @property
    def linears(self) -> dict[str, str]:
        """Names of the linears by role: "up", "down" and, in a gated block, "gate"."""
        roles = {"up": self.up, "down": self.down}
        return roles if self.gate is None else {"gate": self.gate, **roles}


def unwrapped(module: nn.Module) -> nn.Module:
    """The module of the base model below any adapters' layers."""
    get_base_layer = getattr(module, "get_base_layer", None)
    return module if get_base_layer is None else get_base_layer()


def is_linear(module: nn.Module) -> bool:
    """Whether `module` is a linear that LoRA can sit on (plain, Conv1D, or quantised)."""
    from transformers.pytorch_utils import Conv1D

    module = unwrapped(module)
    if isinstance(module, (nn.Linear, Conv1D)):
        return True
    backend = quantization_backend(module)
    return backend is not None and backend.layer_type == "linear"


def linear_size(linear: nn.Module) -> tuple[int, int]:
    """in_features and out_features of a module for which `is_linear` holds."""
    in_features, out_features = _get_in_out_features(unwrapped(linear))
    if in_features is None or out_features is None:
        raise TargetError(f"a {type(linear).__name__} does not tell its number of inputs and outputs")
    return in_features, out_features


def quantization_backend(module: nn.Module) -> Any:
    """PEFT's helper for a quantised linear; None for any other module."""
    from peft.utils.quantization_utils import resolve_quantization_backend

    # torchao's helper wants to know how to write merged weights back, which never happens here
    return resolve_quantization_backend(module, get_apply_tensor_subclass=_never_merged)


def _never_merged() -> NoReturn:
    raise AssertionError("a mixture is never merged")


def is_activation(module: nn.Module) -> bool:
    """Whether `module` is an activation function of torch or transformers."""
    origin = type(module).__module__
    known = origin in ("torch.nn.modules.activation", "transformers.activations")
    return known and not isinstance(module, (nn.Softmax, nn.LogSoftmax, nn.MultiheadAttention))


def run_form(
    kind: Kind, linears: dict[str, Callable[[Tensor], Tensor]], activation: Callable[[Tensor], Tensor], x: Tensor
) -> Tensor:
    """What a block of the given form computes."""
    if kind == "gated":
        hidden = activation(linears["gate"](x)) * linears["up"](x)
    elif kind == "fused":
        gate, up = linears["up"](x).chunk(2, dim=-1)
        hidden = activation(gate) * up
    else:
        hidden = activation(linears["up"](x))
    return linears["down"](hidden)


def dense_weight(linear: nn.Module) -> tuple[Tensor, Tensor | None]:
    """Weight [out, in] and bias of a frozen linear, in `nn.Linear`'s layout."""
    from transformers.pytorch_utils import Conv1D

    bias: Tensor | None = getattr(linear, "bias", None)
    if quantization_backend(linear) is not None:
        given: Any = linear.weight if hasattr(linear, "weight") else None
        packed = getattr(getattr(given, "quant_state", None), "packing_format_for_cpu", False)
        if type(given).__name__ == "Params4bit" and not packed:
            return dequantize_module_weight(linear).detach(), bias
        # by its effect, since weights may be packed for a kernel in a way that cannot be dequantised
        device = next(chain(linear.parameters(), linear.buffers())).device  # those of GPTQ and AWQ are buffers
        with torch.no_grad():
            columns: Tensor = linear(torch.eye(linear_size(linear)[0], device=device))
        return (columns if bias is None else columns - bias).t(), bias
    weight: Tensor = linear.weight  # type: ignore[assignment]
    return (weight.t() if isinstance(linear, Conv1D) else weight), bias
