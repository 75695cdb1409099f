"""Finding feed-forward blocks whose two linears are in sibling modules, as in BERT and its kin.

intermediate:  act(up x)                      output:  LayerNorm(dropout(down h) + x)
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.inject.blocks import shadow_of, trace
from moelora.layers.modules import FeedForwardForm, is_activation, is_linear, linear_size, unwrapped


@dataclass(frozen=True)
class SplitBlock:
    """A feed-forward block in two halves.

    Attributes:
        first, second: Names of the two modules.
        up, down: Names of their linears, as children of `first` and `second`.
        activation: Name of the activation, as a child of `first`.
    """

    first: str
    second: str
    up: str
    down: str
    activation: str

    @property
    def linears(self) -> dict[str, str]:
        """Full names of the linears by role."""
        return {"up": f"{self.first}.{self.up}", "down": f"{self.second}.{self.down}"}

    @property
    def form(self) -> FeedForwardForm:
        """The form of the block, as if it were one module."""
        return FeedForwardForm("plain", up=self.up, down=self.down, activation=self.activation)


def find_split_blocks(modules: Mapping[str, nn.Module]) -> dict[str, SplitBlock]:
    """The split blocks of a model by the full names of their linears.

    Args:
        modules: The modules of the base model by name.
    """
    found: dict[str, SplitBlock] = {}
    for name, module in modules.items():
        children = list(unwrapped(module).named_children())
        for (first_name, first), (second_name, second) in itertools.pairwise(children):
            halves = _halves(unwrapped(first), unwrapped(second))
            if halves is not None:
                prefix = f"{name}." if name else ""
                block = SplitBlock(f"{prefix}{first_name}", f"{prefix}{second_name}", *halves)
                found.update(dict.fromkeys(block.linears.values(), block))
    return found


def _halves(first: nn.Module, second: nn.Module) -> tuple[str, str, str] | None:
    """Names of up, down and the activation, if the two modules look like the halves of a block."""
    ups, downs = _only_linear(first), _only_linear(second)
    activations = [key for key, child in first.named_children() if is_activation(child)]
    if ups is None or downs is None or len(activations) != 1 or any(map(is_activation, second.children())):
        return None
    inner, outer = linear_size(first.get_submodule(ups)), linear_size(second.get_submodule(downs))
    return (ups, downs, activations[0]) if inner == outer[::-1] else None


def _only_linear(module: nn.Module) -> str | None:
    """Name of the child that is the only linear anywhere in `module`, or None."""
    children = dict(module.named_children())
    linears = [key for key, child in children.items() if is_linear(child)]
    others = (part for key, child in children.items() if key not in linears for part in child.modules())
    return linears[0] if len(linears) == 1 and not any(map(is_linear, others)) else None


def check_split_block(modules: Mapping[str, nn.Module], block: SplitBlock) -> None:
    """Refuse halves that compute something else than they look like.

    Raises:
        TargetError: Names the half that is at fault.
    """
    first, second = unwrapped(modules[block.first]), unwrapped(modules[block.second])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            shadow, widths = shadow_of(first)
            x, _, output = trace(shadow, widths)
            up, activation = shadow.get_submodule(block.up), shadow.get_submodule(block.activation)
            expected = activation(up(x))
            fits = output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-9, atol=1e-9)
        except Exception as error:
            raise TargetError(_refusal(block.first, first, f"{type(error).__name__}: {error}")) from error
        if not fits:
            raise TargetError(_refusal(block.first, first, "it computes something else than act(up x)"))
        if not _reads_first_argument(second, block.down):
            raise TargetError(
                _refusal(block.second, second, f"{block.down!r} does not read its first argument as it is")
            )


def _reads_first_argument(second: nn.Module, down: str) -> bool:
    shadow, widths = shadow_of(second)
    linear = shadow.get_submodule(down)
    hidden = torch.randn(2, 3, widths[0], dtype=torch.float64)
    residual = torch.randn(2, 3, linear_size(linear)[1], dtype=torch.float64)
    read: list[Tensor] = []
    linear.register_forward_hook(lambda module, args, output: read.append(args[0]))
    for args in ((hidden, residual), (hidden,)):
        # another number of arguments, or a norm of another size behind the linear
        with contextlib.suppress(TypeError, RuntimeError):
            shadow(*args)
        if read:
            break
    return len(read) == 1 and read[0] is hidden


def _refusal(name: str, half: nn.Module, reason: str) -> str:
    return (
        f"{name!r} ({type(half).__name__}) looks like half of a feed-forward block split over two modules, but "
        f"{reason}. Known: act(up x) in one module, and down of its output in the next. Leave its linears out with "
        "exclude_modules, or use a preset with a mixture on each linear (most have)."
    )
