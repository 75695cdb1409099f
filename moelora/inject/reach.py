"""Linears that an adapter does not reach: wrapped, it would never run, or what it wraps is no linear.

What can be read from the structure is found here, without running the model:

- The parent takes the weights themselves for a fused operation and passes the modules by: `nn.MultiheadAttention`,
  `nn.TransformerEncoderLayer` (in evaluation), the kernels of state-space models (Mamba and its kin), and every class
  whose code reads a linear's weight and never calls the linear.
- A subclass of `nn.Linear` has a forward of its own that computes something else, as Llama 4's router does.

What cannot be known so: whether a forward calls a module at all, and whether the loss depends on it. A pooler that the
task does not use, the last layers of a vision tower whose earlier output is taken, heads for further tokens or for
another task: an adapter there is trained if the forward runs it and the loss depends on it, and stays at B = 0 if not.
Leave such parts out with `exclude_modules`.
"""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Callable, Mapping, Set

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.inject.base_modules import join
from moelora.layers.modules import is_linear, quantization_backend, unwrapped

# the weight itself; not its dtype or device, which code often asks for
_WEIGHT_READ = re.compile(r"\bself\.(\w+)\.weight\b(?!\.)")
# a call, or the module handed on
_OTHER_USE = re.compile(r"\bself\.(\w+)\b(?!\.(?:weight|bias|in_features|out_features)\b)")

Uses = tuple[Set[str], Set[str]]
"""Attributes of `self` whose weight a code reads, and those that it uses otherwise."""


def find_unreached(modules: Mapping[str, nn.Module]) -> dict[str, str]:
    """Linears that must not be adapted, with the reason, as the end of a sentence.

    Args:
        modules: The modules of the base model by name.
    """
    reasons: dict[str, str] = {}
    forwards: dict[type[nn.Module], str | None] = {}
    uses: dict[type[nn.Module], Uses] = {}
    for name, module in modules.items():
        base = unwrapped(module)
        for child in sorted(_read_directly(base, uses)):
            reasons[join(name, child)] = (
                f"the forward of {name!r} ({type(base).__name__}) reads its weight directly and passes an adapter by"
            )
        if isinstance(base, nn.Linear):
            kind = type(base)
            if kind not in forwards:
                forwards[kind] = _odd_forward(base)
            odd = forwards[kind]
            if odd is not None:
                reasons[name] = f"its class {kind.__name__} has a forward of its own: {odd}"
    return reasons


def _read_directly(module: nn.Module, uses: dict[type[nn.Module], Uses]) -> set[str]:
    """Names of the linears in `module` whose weights its forward takes without calling them."""
    if isinstance(module, nn.MultiheadAttention):
        return {"out_proj"}
    if isinstance(module, nn.TransformerEncoderLayer):
        return {"linear1", "linear2"}
    linears = {name for name, child in module.named_children() if is_linear(child)}
    if not linears:
        return linears
    kind = type(module)
    if kind not in uses:
        uses[kind] = _uses(kind)
    read, other = uses[kind]
    if {"A_log", "D"} <= module._parameters.keys():  # a state-space model: a kernel, or else the modules are called
        return linears & read
    return linears & read - other


def _uses(kind: type[nn.Module]) -> Uses:
    """What the methods of a class use, but those that only initialise."""
    read: set[str] = set()
    other: set[str] = set()
    for parent in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, method in vars(parent).items():
            if inspect.isfunction(method) and "init" not in name and "reset" not in name:
                found = _uses_in(method)
                read |= found[0]
                other |= found[1]
    return read, other


# by the function, which a patch replaces: reading the code again for every adapter would be half of an injection
@functools.cache
def _uses_in(method: Callable[..., object]) -> Uses:
    """What one function uses; nothing where its code cannot be read."""
    try:
        code = inspect.getsource(method)
    except (OSError, TypeError):
        return frozenset(), frozenset()
    return frozenset(_WEIGHT_READ.findall(code)), frozenset(_OTHER_USE.findall(code))


def _odd_forward(linear: nn.Linear) -> str | None:
    """What a subclass of `nn.Linear` computes that `x W^T + b` is not, or None."""
    if type(linear).forward is nn.Linear.forward or _is_quantised(linear):
        return None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        shadow = copy.copy(linear)
        shadow.__dict__ = {key: value for key, value in linear.__dict__.items() if key != "forward"}
        shadow._forward_hooks, shadow._forward_pre_hooks = type(linear._forward_hooks)(), type(linear._forward_hooks)()
        shadow.in_features, shadow.out_features, shadow.training = 3, 5, False
        shadow._parameters = {
            "weight": nn.Parameter(torch.randn(5, 3, dtype=torch.float64, device="cpu")),
            "bias": None if linear.bias is None else nn.Parameter(torch.randn(5, dtype=torch.float64, device="cpu")),
        }
        x = torch.randn(2, 4, 3, dtype=torch.float64, device="cpu")
        try:
            output = shadow(x)
        except Exception as error:
            return f"on an input of [batch, sequence, features] it fails with {type(error).__name__}: {error}"
        if not isinstance(output, Tensor):
            return f"it returns a {type(output).__name__}"
        expected = F.linear(x, shadow.weight, shadow.bias)
        close = output.shape == expected.shape and torch.allclose(output.double(), expected, rtol=1e-5, atol=1e-5)
    return None if close else "it computes something else than x W^T + b"


def _is_quantised(linear: nn.Linear) -> bool:
    """Whether the weight is not stored as a number of at least 16 bits, or the class is of a quantisation library."""
    ours = type(linear).__module__.startswith("transformers.integrations.")
    return ours or quantization_backend(linear) is not None or linear.weight.element_size() < 2
