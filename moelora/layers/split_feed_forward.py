"""A mixture on a feed-forward block whose two linears are in sibling modules, as in BERT and its kin.

    intermediate:  act(up x)                      output:  LayerNorm(dropout(down h) + x)

The mixture layer takes the place of the first half and gives the output of the whole mixture, `down` included; a
pass-through takes the place of `down` and hands on what it is given. What the second half does after `down` is left as
it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.modules import FeedForwardForm

_MADE_BY = "_moelora_made_by"


class MixtureSplitFeedForward(MixtureFeedForward):
    """`MixtureFeedForward` at the first half of a split block; give its `pass_through` the place of `down`.

    Args:
        base_layer: The first half.
        name: Its name in the base model.
        form: The form of the block.
        down: The linear of the second half.
    """

    def __init__(self, base_layer: nn.Module, name: str, form: FeedForwardForm, down: nn.Module) -> None:
        super().__init__(base_layer, name, form)
        self.__dict__["down"] = down  # not a submodule: its place is in the second half

    def linear(self, role: str) -> nn.Module:
        """The frozen linear of a role."""
        down: nn.Module = self.__dict__["down"]
        return down if role == "down" else super().linear(role)

    def base_output(self, x: Tensor) -> Tensor:
        """What the block gives without an adapter, up to and with `down`."""
        output: Tensor = self.linear("down")(self.base_layer(x))
        return output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The mixture, `down` included, while an adapter is active; else the first half."""
        y = super().forward(x, *args, **kwargs)
        if _tensors_can_be_marked():
            setattr(y, _MADE_BY, self._mark(y))
        return y

    def made(self, x: Tensor) -> bool:
        """Whether `x` is what a forward of this layer gave, unchanged; always true where tensors are only traced."""
        return not _tensors_can_be_marked() or getattr(x, _MADE_BY, None) == self._mark(x)

    def _mark(self, y: Tensor) -> tuple[int, int]:
        # kept on the tensor, not here, since several threads may run the layer at once; the version counts what is
        # written into the tensor
        return id(self), 0 if y.is_inference() else y._version


def _tensors_can_be_marked() -> bool:
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


class PassThrough(nn.Module):
    """Stands at the `down` of a split block: the plain linear, or nothing while the mixture has done its work.

    Args:
        base_layer: The linear.
        mixture: The layer at the first half.
    """

    def __init__(self, base_layer: nn.Module, mixture: MixtureSplitFeedForward) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.__dict__["mixture"] = mixture  # not a submodule: it has a place of its own

    def get_base_layer(self) -> nn.Module:
        """The linear; PEFT puts it back when it unloads."""
        return self.base_layer

    @property
    def weight(self) -> Any:
        """The linear's weight, which model code may look at."""
        return self.base_layer.weight

    @property
    def bias(self) -> Any:
        """The linear's bias."""
        return self.base_layer.bias

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`x` itself if the mixture is active, else the linear.

        Raises:
            TargetError: If `x` is not what the mixture gave: the model does something between the two halves.
        """
        mixture: MixtureSplitFeedForward = self.__dict__["mixture"]
        if not mixture.is_active(kwargs.pop("adapter_names", None)):
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if not mixture.made(x):
            raise TargetError(
                f"{mixture.name!r} was read as the first half of a feed-forward block, but the model changes its "
                "output before the second half reads it. Leave its linears out with exclude_modules, or use a preset "
                "with a mixture on each linear (most have)."
            )
        return x


def wrap_down(model: nn.Module, name: str, mixture: MixtureSplitFeedForward) -> None:
    """Put a pass-through in the place of the linear `name` of `model`."""
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, PassThrough(mixture.linear("down"), mixture))
