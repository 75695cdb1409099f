"""A mixture of experts beside a whole block of the base model, such as its own mixture of experts.

Shape suffixes: T tokens, E experts of the base, K chosen experts of a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.layers.base import Here, MoeLoraLayer
from moelora.layers.linear import MixtureLinear


class MixtureBlock(MixtureLinear):
    """`y = block(x) + scaling * sum_e g_e(x) B_e A_e x` around a block that keeps the number of features.

    Args:
        base_layer: The block; it takes the hidden states and gives one tensor of the same shape.
        name: Its name in the base model.
        width: Number of features.
        router: The block's own router; None if it has none that is a module.
    """

    def __init__(self, base_layer: nn.Module, name: str, width: int, router: nn.Module | None) -> None:
        MoeLoraLayer.__init__(self, base_layer, name)
        self.quantization_backend: Any = None
        self.in_features = self.out_features = width
        self.__dict__["base_router"] = router  # not a submodule: its place is in the block

    def _base(self, x: Tensor) -> Tensor:
        result: Any = self.base_layer(x)
        if not isinstance(result, Tensor) or result.shape != x.shape:
            raise TargetError(
                f"{self.name!r} ({type(self.base_layer).__name__}) gives {_what(result)} for {list(x.shape)}; allowed: "
                "one tensor of the same shape. Leave it out with exclude_modules."
            )
        return result

    def prepared_T(self, adapter: str, x: Tensor, here: Here) -> Tensor | None:
        """See `MoeLoraLayer.prepared_T`; what the block's own router decides, [T, 2, E]: logits and weights."""
        if not self.configs[adapter].scores.reads_base_router:
            return super().prepared_T(adapter, x, here)
        router: Any = self.__dict__["base_router"]
        # by its class: hooks that collect the router's logits must not hear it twice
        found: Any = () if router is None else type(router).forward(router, x.reshape(-1, x.shape[-1]))
        if not isinstance(found, tuple) or len(found) != 3 or found[1].shape != found[2].shape:
            raise TargetError(
                f"the router of {self.name!r} ({type(router).__name__}) does not give logits, weights and experts of "
                "each token, so that its decision cannot be read; allowed: a router as in Mixtral, OLMoE or Qwen3-MoE. "
                "Take the preset 'perft_r', which has a router of its own."
            )
        logits_TE, weights_TK, ids_TK = found
        weights_TE = torch.zeros_like(logits_TE, dtype=torch.float32).scatter(-1, ids_TK, weights_TK.float())
        return torch.stack([logits_TE.float(), weights_TE], 1)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[Any, Any]:
        parameter = next(base_layer.parameters())
        return parameter.device, parameter.dtype

    def extra_repr(self) -> str:
        """Nothing."""
        return ""


def _what(result: Any) -> str:
    return str(list(result.shape)) if isinstance(result, Tensor) else f"a {type(result).__name__}"
