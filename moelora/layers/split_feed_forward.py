"""A mixture on a feed-forward block whose two linears are in sibling modules, as in BERT and its kin.

    intermediate:  act(up x)                      output:  LayerNorm(dropout(down h) + x)

The mixture layer takes the place of the first half and gives the output of the whole mixture, `down` included; a
pass-through takes the place of `down` and hands on what it is given. What the second half does after `down` is left as
it is. Where the linears stand in the layer itself, as in OPT, the first half is `up` alone, and another pass-through
takes the place of the activation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.layers.feed_forward import MixtureFeedForward
from moelora.layers.modules import FeedForwardForm, unwrapped

_MADE_BY = "_moelora_made_by"


class MixtureSplitFeedForward(MixtureFeedForward):
    """`MixtureFeedForward` at the first half of a split block; `pass_on` does the rest.

    Args:
        base_layer: The first half.
        name: Its name in the base model.
        form: The form of the block.
        down: The linear of the second half.
        activation: The activation, if it is not in the first half.
    """

    def __init__(
        self, base_layer: nn.Module, name: str, form: FeedForwardForm, down: nn.Module, activation: nn.Module | None
    ) -> None:
        super().__init__(base_layer, name, form)
        # not submodules: they have places of their own
        self.__dict__["down"], self.__dict__["outer_activation"] = down, activation

    def linear(self, role: str) -> nn.Module:
        """The frozen linear of a role."""
        down: nn.Module = self.__dict__["down"]
        return down if role == "down" else super().linear(role)

    def activation(self) -> nn.Module:
        """See `MixtureFeedForward.activation`."""
        outer: nn.Module | None = self.__dict__["outer_activation"]
        return super().activation() if outer is None else outer

    def base_output(self, x: Tensor) -> Tensor:
        """What the block gives without an adapter, up to and with `down`."""
        outer: nn.Module | None = self.__dict__["outer_activation"]
        hidden = self.base_layer(x)
        output: Tensor = self.linear("down")(hidden if outer is None else outer(hidden))
        return output

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The mixture, `down` included, while an adapter is active; else the first half."""
        y = super().forward(x, *args, **kwargs)
        self.mark(y, 0)
        return y

    def mark(self, y: Tensor, step: int) -> None:
        """Note on an output how many pass-throughs it has come through."""
        if _tensors_can_be_marked():
            setattr(y, _MADE_BY, self._mark(y, step))

    def made(self, x: Tensor, step: int) -> bool:
        """Whether `x` is what a forward gave, unchanged, after so many pass-throughs; true where tensors are traced."""
        return not _tensors_can_be_marked() or getattr(x, _MADE_BY, None) == self._mark(x, step)

    def _mark(self, y: Tensor, step: int) -> tuple[int, int, int]:
        # kept on the tensor, not here, since several threads may run the layer at once; the version counts what is
        # written into the tensor
        return id(self), step, 0 if y.is_inference() else y._version


def _tensors_can_be_marked() -> bool:
    return not torch.compiler.is_compiling() and not torch.jit.is_tracing()  # type: ignore[attr-defined]


class PassThrough(nn.Module):
    """Stands at a later part of a split block: the plain part, or nothing while the mixture has done its work.

    Args:
        base_layer: The part.
        mixture: The layer at the first half.
        step: How many pass-throughs come before it.
    """

    def __init__(self, base_layer: nn.Module, mixture: MixtureSplitFeedForward, step: int) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.training = base_layer.training
        self.step = step
        self.__dict__["mixture"] = mixture  # not a submodule: it has a place of its own

    def get_base_layer(self) -> nn.Module:
        """The part; PEFT puts it back when it unloads."""
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
        """`x` itself if the mixture is active, else the part.

        Raises:
            TargetError: If `x` is not what the mixture gave: the model does something between the two halves.
        """
        mixture: MixtureSplitFeedForward = self.__dict__["mixture"]
        if not mixture.is_active(kwargs.pop("adapter_names", None)):
            output: Tensor = self.base_layer(x, *args, **kwargs)
            return output
        if not mixture.made(x, self.step):
            raise TargetError(
                f"{mixture.name!r} was read as the first half of a feed-forward block, but the model changes its "
                "output before the second half reads it. Leave its linears out with exclude_modules, or use a preset "
                "with a mixture on each linear (most have)."
            )
        mixture.mark(x, self.step + 1)
        return x


def pass_on(model: nn.Module, names: Sequence[str], mixture: MixtureSplitFeedForward) -> None:
    """Put pass-throughs in the places of parts of `model`, in the order in which a forward calls them."""
    for step, name in enumerate(names):
        parent, _, child = name.rpartition(".")
        part = unwrapped(model.get_submodule(name))
        setattr(model.get_submodule(parent), child, PassThrough(part, mixture, step))
