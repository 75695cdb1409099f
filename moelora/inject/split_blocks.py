"""Finding feed-forward blocks that are no modules of their own.

Their two linears are in sibling modules, as in BERT and its kin,

    intermediate:  act(up x)                      output:  LayerNorm(dropout(down h) + x)

or stand in the layer itself beside its attention, as in OPT, BART, Whisper and ALBERT.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.inject.blocks import shadow_of, trace
from moelora.layers.modules import FeedForwardForm, is_activation, is_linear, linear_size, unwrapped


@dataclass(frozen=True)
class SplitBlock:
    """A feed-forward block in two halves.

    Attributes:
        first, second: Names of the two modules; `up` and `down` themselves where these stand in the layer.
        up, down: Names of the linears.
        activation: Name of the activation: a child of `first`, or a sibling of `up`.
    """

    first: str
    second: str
    up: str
    down: str
    activation: str

    @property
    def linears(self) -> dict[str, str]:
        """Names of the linears by role."""
        return {"up": self.up, "down": self.down}

    @property
    def in_layer(self) -> bool:
        """Whether the linears stand in the layer itself."""
        return self.first == self.up

    @property
    def passing(self) -> tuple[str, ...]:
        """Names of the modules behind `first` that have nothing left to do once it gives the whole block's output."""
        return (self.activation, self.down) if self.in_layer else (self.down,)

    @property
    def form(self) -> FeedForwardForm:
        """The form of the block, as if it were one module."""
        if self.in_layer:
            return FeedForwardForm("plain", up="", down="", activation="")
        up, down, activation = (name.rpartition(".")[2] for name in (self.up, self.down, self.activation))
        return FeedForwardForm("plain", up=up, down=down, activation=activation)


def find_split_blocks(modules: Mapping[str, nn.Module]) -> dict[str, SplitBlock]:
    """The split blocks of a model by the full names of their linears.

    Args:
        modules: The modules of the base model by name.
    """
    found: dict[str, SplitBlock] = {}
    for name, module in modules.items():
        prefix = f"{name}." if name else ""
        children = list(unwrapped(module).named_children())
        blocks = [_in_layer(prefix, dict(children))] if name else []
        for (first_name, first), (second_name, second) in itertools.pairwise(children):
            halves = _halves(unwrapped(first), unwrapped(second))
            if halves is not None:
                up, down, activation = halves
                half, other = f"{prefix}{first_name}", f"{prefix}{second_name}"
                blocks.append(SplitBlock(half, other, f"{half}.{up}", f"{other}.{down}", f"{half}.{activation}"))
        for block in blocks:
            if block is not None:
                found.update(dict.fromkeys(block.linears.values(), block))
    return found


def _in_layer(prefix: str, children: Mapping[str, nn.Module]) -> SplitBlock | None:
    """The block whose linears are two of a layer's children, if another of them has linears of its own."""
    linears = [key for key, child in children.items() if is_linear(child)]
    activations = [key for key, child in children.items() if is_activation(unwrapped(child))]
    others = (part for key, child in children.items() if key not in linears for part in child.modules())
    if len(linears) != 2 or len(activations) != 1 or not any(map(is_linear, others)):
        return None
    up, down = linears
    if linear_size(children[up]) != linear_size(children[down])[::-1]:
        return None
    up, down, activation = (f"{prefix}{key}" for key in (up, down, activations[0]))
    return SplitBlock(up, down, up, down, activation)


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
        TargetError: Names the half, or the layer, that is at fault.
    """
    if block.in_layer:
        _check_in_layer(modules, block)
        return
    up_name, down_name, activation_name = (name.rpartition(".")[2] for name in (block.up, block.down, block.activation))
    first, second = unwrapped(modules[block.first]), unwrapped(modules[block.second])
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            shadow, widths = shadow_of(first)
            x, _, output = trace(shadow, widths)
            up, activation = shadow.get_submodule(up_name), shadow.get_submodule(activation_name)
            expected = activation(up(x))
            fits = output.shape == expected.shape and torch.allclose(output, expected, rtol=1e-9, atol=1e-9)
        except Exception as error:
            raise TargetError(_refusal(block.first, first, f"{type(error).__name__}: {error}")) from error
        if not fits:
            raise TargetError(_refusal(block.first, first, "it computes something else than act(up x)"))
        if not _reads_first_argument(second, down_name):
            raise TargetError(
                _refusal(block.second, second, f"{down_name!r} does not read its first argument as it is")
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


class _Passing(nn.Module):
    """Stands for a part of a layer that is not looked into: gives its first tensor, as one of so many outputs."""

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.outputs = outputs

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
        return (x, *[None] * (self.outputs - 1)) if self.outputs else x


def _check_in_layer(modules: Mapping[str, nn.Module], block: SplitBlock) -> None:
    name = block.up.rpartition(".")[0]
    layer, reasons = unwrapped(modules[name]), list[str]()
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for outputs in (2, 3, 4, 1, 0):  # of attention: a tuple of some length, or last, since it unpacks too, a tensor
            try:
                if _flows(layer, block, outputs):
                    return
                reasons.insert(0, "its forward does not give act(up x) to the second, as it is and to nothing else")
            except Exception as error:
                said = f"{type(error).__name__}: {error}".removesuffix(": ")
                reasons.append(f"its forward cannot be followed ({said})")
    up, down, activation = (path.rpartition(".")[2] for path in (block.up, block.down, block.activation))
    raise TargetError(
        f"{name!r} ({type(layer).__name__}) has the linears {up!r} and {down!r} and the activation {activation!r} of a "
        f"feed-forward block beside other parts, but {reasons[0]}; a dropout between them has to be 0. Leave its "
        "linears out with exclude_modules, or use a preset with a mixture on each linear (most have)."
    )


def _flows(layer: nn.Module, block: SplitBlock, outputs: int) -> bool:
    """Whether a layer gives act(up x) to `down`, in training too, and to nothing else."""
    names = [name.rpartition(".")[2] for name in (block.up, block.activation, block.down)]
    stand_ins: dict[str, nn.Module] = {}
    for key, child in layer.named_children():
        if key == names[1] or isinstance(child, nn.Dropout):
            stand_ins[key] = copy.deepcopy(unwrapped(child))
        elif key not in names:
            stand_ins[key] = _Passing(outputs if any(map(is_linear, child.modules())) else 0)
    shadow, widths = shadow_of(layer, stand_ins)
    shadow.__dict__["gradient_checkpointing"] = False
    up, activation, down = (shadow.get_submodule(name) for name in names)
    x = torch.randn(5, 3, widths[0], dtype=torch.float64)
    parameters = list(inspect.signature(layer.forward).parameters.values())[1:]
    required = [each for each in parameters if each.default is each.empty and each.kind is each.POSITIONAL_OR_KEYWORD]

    def run() -> tuple[Tensor, list[tuple[nn.Module, Any, Any]]]:
        calls: list[tuple[nn.Module, Any, Any]] = []
        hooks = [
            part.register_forward_hook(lambda module, args, output: calls.append((module, args[0], output)))
            for part in (up, activation, down)
        ]
        output = shadow(x, **{each.name: None for each in required})
        for hook in hooks:
            hook.remove()
        return output if isinstance(output, Tensor) else output[0], calls

    shadow.train()
    _, calls = run()
    if [call[0] for call in calls] != [up, activation, down]:
        return False
    if calls[0][2] is not calls[1][1] or calls[1][2] is not calls[2][1]:
        return False
    shadow.eval()
    expected, calls = run()
    given = calls[2][2]
    # with other values between the linears, and the same behind them, nothing changes
    for part in (up, activation):
        part.register_forward_hook(lambda module, args, output: torch.randn_like(output))
    down.register_forward_hook(lambda module, args, output: given)
    return torch.equal(run()[0], expected)
