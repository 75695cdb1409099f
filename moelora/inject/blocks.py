"""Finding the structure of a feed-forward block without knowing its class.

A shadow of the block, with the same code but small random linears, is run once on random tokens while its parts report
when they are called and with what. That shows which linear feeds the activation, where the dropouts sit, and, by
comparison with our own form, that nothing else happens in the block. The real weights are never touched, so quantised,
offloaded, sharded and meta-device blocks are read the same way.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from moelora.errors import TargetError
from moelora.layers.modules import FeedForwardForm, Kind, is_activation, is_linear, linear_size, run_form

FORMS = "down(act(gate x) * up x), down(act(up x)), and down(act(g) * u) with g, u the halves of one linear"


def looks_like_feed_forward(module: nn.Module) -> bool:
    """Whether `module` has what a feed-forward block has: two or three linears and one activation of its own."""
    children = list(module.children())
    linears = sum(is_linear(child) for child in children)
    return linears in (2, 3) and sum(map(is_activation, children)) == 1


def is_feed_forward(module: nn.Module) -> bool:
    """Whether `module` not only looks like a feed-forward block but computes what one computes."""
    if not looks_like_feed_forward(module):
        return False
    try:
        find_form(module, "")
    except TargetError:
        return False
    return True


def find_form(block: nn.Module, name: str) -> FeedForwardForm:
    """Find the form of a feed-forward block.

    Args:
        block: A module for which `looks_like_feed_forward` holds.
        name: Its name, for the error.

    Raises:
        TargetError: If the block computes something that is none of the known forms.
    """
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        try:
            shadow, widths = shadow_of(block)
            x, calls, expected = trace(shadow, widths)
            form = _form_of(shadow, calls)
        except Exception as error:
            raise TargetError(_refusal(block, name, f"{type(error).__name__}: {error}")) from error
        modules = {role: getattr(shadow, child) for role, child in form.linears.items()}
        actual = run_form(form.kind, modules, getattr(shadow, form.activation), x)
    if actual.shape != expected.shape or not torch.allclose(actual, expected, rtol=1e-9, atol=1e-9):
        raise TargetError(_refusal(block, name, f"it was read as {form.kind!r} but computes something else"))
    return form


def _refusal(block: nn.Module, name: str, reason: str) -> str:
    return (
        f"feed-forward block {name!r} ({type(block).__name__}) fits none of the known forms: {reason}. Known: {FORMS}. "
        "Leave its linears out with exclude_modules, or use a preset with a mixture on each linear (most have)."
    )


def shadow_of(block: nn.Module, stand_ins: Mapping[str, nn.Module] | None = None) -> tuple[nn.Module, list[int]]:
    """A copy of the block that shares nothing writable with it, and the possible numbers of features of its input.

    Args:
        block: The block.
        stand_ins: What takes the place of some of its children.
    """
    stand_ins = stand_ins or {}
    children = {key: child for key, child in block.named_children() if key not in stand_ins}
    sizes = {}
    for child_name, child in children.items():
        if is_linear(child):
            sizes[child_name] = linear_size(child)
        elif any(map(is_linear, child.modules())):
            raise ValueError(f"its part {child_name!r} has linears of its own")
    # the same ratios in the smallest numbers, so that halves stay halves
    unit = math.gcd(*(size for pair in sizes.values() for size in pair))
    shadow = copy.copy(block)
    shadow.__dict__ = dict(block.__dict__)
    shadow.__dict__.pop("forward", None)  # wrappers of offloading libraries
    shadow._modules = {**block._modules, **stand_ins}
    shadow._forward_hooks, shadow._forward_pre_hooks = type(block._forward_hooks)(), type(block._forward_pre_hooks)()
    generator = torch.Generator().manual_seed(1)
    _randomise(shadow, generator)
    for child_name, child in children.items():
        if child_name in sizes:
            in_features, out_features = (size // unit for size in sizes[child_name])
            linear = nn.utils.skip_init(nn.Linear, in_features, out_features, dtype=torch.float64)
            for parameter in linear.parameters():
                parameter.normal_(std=0.5, generator=generator)
            shadow._modules[child_name] = linear
        else:
            shadow._modules[child_name] = copied = copy.deepcopy(child)
            for part in copied.modules():
                _randomise(part, generator)
    shadow.training = False
    for child in shadow.children():
        child.eval()
    return shadow, list(dict.fromkeys(in_features // unit for in_features, _ in sizes.values()))


def _randomise(module: nn.Module, generator: torch.Generator) -> None:
    """Replace a module's own parameters, so that one that happens to be neutral now is not overlooked."""
    for tensors in ("_parameters", "_buffers"):
        replaced = {}
        for key, tensor in getattr(module, tensors).items():
            if tensor is not None and tensor.is_floating_point():
                random = torch.randn(tensor.shape, dtype=torch.float64, generator=generator)
                tensor = nn.Parameter(random) if tensors == "_parameters" else random
            replaced[key] = tensor
        setattr(module, tensors, replaced)


def trace(shadow: nn.Module, widths: list[int]) -> tuple[Tensor, list[tuple[str, Tensor, Tensor]], Tensor]:
    """Run the shadow: its input, which parts were called with what and gave what, and its output."""
    calls: list[tuple[str, Tensor, Tensor]] = []

    def report(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        return lambda module, args, output: calls.append((name, args[0], output))

    for child_name, child in shadow.named_children():
        child.register_forward_hook(report(child_name))
    # small and large tokens: a limit on what flows through shows only on the large ones
    sizes = torch.logspace(-2, 3, 6, dtype=torch.float64).view(2, 3, 1)
    generator = torch.Generator().manual_seed(0)
    for width in widths:
        x = torch.randn(2, 3, width, dtype=torch.float64, generator=generator) * sizes
        calls.clear()
        try:
            output = shadow(x)
        except RuntimeError:  # not the width of the block's input
            if width == widths[-1]:
                raise
            continue
        if not isinstance(output, Tensor):
            raise TypeError(f"it returns a {type(output).__name__}")
        return x, calls, output
    raise AssertionError("a block without linears has no width")


def _form_of(shadow: nn.Module, calls: list[tuple[str, Tensor, Tensor]]) -> FeedForwardForm:
    linears = [call for call in calls if isinstance(shadow._modules[call[0]], nn.Linear)]
    activations = [call for call in calls if is_activation(shadow._modules[call[0]])]  # type: ignore[arg-type]
    if len(activations) != 1 or len({call[0] for call in linears}) != len(linears) or len(linears) not in (2, 3):
        raise ValueError(f"it calls {[call[0] for call in calls]}")
    names = [call[0] for call in calls]
    down = linears[-1][0]
    dropouts = [name for name in names if isinstance(shadow._modules[name], nn.Dropout)]
    hidden = [name for name in dropouts if names.index(name) < names.index(down)]
    output = [name for name in dropouts if names.index(name) > names.index(down)]
    if len(hidden) > 1 or len(output) > 1:
        raise ValueError(f"it calls {names}")
    fed_by = [call[0] for call in linears if call[2] is activations[0][1]]
    kind: Kind
    if len(linears) == 3 and fed_by:
        kind, gate = "gated", fed_by[0]
        up = next(call[0] for call in linears[:-1] if call[0] != gate)
    elif len(linears) == 2:
        kind, gate, up = ("plain" if fed_by else "fused"), None, linears[0][0]
    else:
        raise ValueError("its activation is not fed by one of its linears")
    return FeedForwardForm(
        kind,
        up=up,
        down=down,
        gate=gate,
        activation=activations[0][0],
        hidden_dropout=hidden[0] if hidden else None,
        output_dropout=output[0] if output else None,
    )
