"""What a training step does that no clock is needed for: launches, bytes kept for the backward pass, FLOPs, waits.

The step runs on meta tensors. They take the path of an accelerator (their device is not the CPU), compute nothing, and
cannot be read, so that a size of Llama-3-8B is counted in seconds.
"""

from __future__ import annotations

import math
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from moelora.ops import triton_feed_forward, triton_linear

_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "masked_select", "unique", "_unique2", "bincount"}
"""Operators whose result's value or size is needed on the host, which waits for the device then."""

_MOVES_NO_DATA = {"detach", "_unsafe_view", "lift_fresh", "is_same_size", "sym_size", "sym_stride", "set_", "alias"}
"""Operators beside views and allocations that launch no kernel."""

_ATTENTION = "_scaled_dot_product"


def _batched_product(rows: Any, left: tuple[int, ...], right: tuple[int, ...], **_: Any) -> int:
    """FLOPs of `rows += left @ right`, by the shapes."""
    return 2 * math.prod(left) * right[-1]


def _linear(x_TD: tuple[int, ...], a_ERD: tuple[int, ...], b_EOR: tuple[int, ...], *_: Any, **__: Any) -> int:
    """FLOPs of the products with A and B, of all experts."""
    E, O, R = b_EOR
    return 2 * x_TD[0] * E * R * (x_TD[1] + O)


def _token_grads(grad_TO: tuple[int, ...], a_ERD: tuple[int, ...], b_EOR: Any, *rest: Any, **_: Any) -> int:
    """FLOPs of the gradients of the inner activations, and of the tokens where they are needed."""
    T, O = grad_TO
    E, R, D = a_ERD
    *_gates_to_p, needs_x, _needs_gates = rest
    return 2 * T * E * R * (O + D * needs_x)


def _factor_grads(
    grad_TO: tuple[int, ...], x_TD: tuple[int, ...], gates: Any, inner_TM: tuple[int, ...], *_: Any, **__: Any
) -> int:
    """FLOPs of the gradients of A and B."""
    return 2 * grad_TO[0] * inner_TM[1] * (x_TD[1] + grad_TO[1])


def _hidden_products(*given: Any) -> tuple[int, int, int]:
    """FLOPs of one product with the factors of all experts, and how many have them: linears before, and down."""
    up_TF, _, _, _, up_b, gate_b, down_a, weights_TK, *_rest, is_fused = given
    halves = 2 if is_fused else 1
    if down_a is not None:
        E, R, _ = down_a
    else:
        E, _, R = up_b or gate_b
    before = halves * (up_b is not None) + (gate_b is not None)
    return 2 * math.prod(up_TF) // halves * weights_TK[1] * E * R, before, int(down_a is not None)


def _hidden(*given: Any, **_: Any) -> int:
    """FLOPs of the products of each choice with the factors of all experts."""
    product, before, down = _hidden_products(*given)
    return product * (before + down)


def _hidden_token_grads(grad: Any, grad_inner: Any, *given: Any, **_: Any) -> int:
    """FLOPs of making pre-activations again, and of the gradients of hidden units and inner activations."""
    product, before, down = _hidden_products(*given)
    return product * (2 * before + down)


def _hidden_factor_grads(grad: Any, grad_inner: Any, *given: Any, **_: Any) -> int:
    """FLOPs of making pre-activations and the gradient of hidden units again, and of the gradients of the factors."""
    product, before, down = _hidden_products(*given)
    return product * 2 * (before + down)


_UNKNOWN_TO_TORCH = {
    torch.ops.aten.baddbmm_: _batched_product,
    torch.ops.moelora.mixture_linear: _linear,
    torch.ops.moelora.mixture_linear_token_grads: _token_grads,
    torch.ops.moelora.mixture_linear_factor_grads: _factor_grads,
    **dict(zip(triton_feed_forward.OPERATORS, (_hidden, _hidden_token_grads, _hidden_factor_grads), strict=True)),
}
"""Matrix products that torch's counter of FLOPs does not know."""


@dataclass(frozen=True)
class Count:
    """What one forward and backward pass of a module takes.

    Attributes:
        forward, backward: Launches: operators that compute or move data. One that a device runs as several kernels (a
            sort) counts as one; views and allocations do not count.
        saved: Bytes of the storages that the backward pass needs, parameters and buffers left out.
        flops: Of the matrix products, two for each multiply-add; attention's are left out.
        syncs: Operators for which the host waits for the device.
    """

    forward: int
    backward: int
    saved: int
    flops: int
    syncs: int

    @property
    def launches(self) -> int:
        """Of both passes."""
        return self.forward + self.backward

    def over(self, other: Count) -> dict[str, float]:
        """The ratios to another one."""
        return {
            "launches": self.launches / other.launches,
            "saved": self.saved / other.saved,
            "flops": self.flops / other.flops,
        }

    def as_dict(self) -> dict[str, int]:
        """For JSON."""
        return asdict(self)


class Launches(TorchDispatchMode):
    """Counts the operators that launch something.

    Attributes:
        by_name: How often each ran.
        syncs: Operators for which the host waits for the device, by name.
    """

    def __init__(self) -> None:
        super().__init__()
        self.by_name: Counter[str] = Counter()
        self.syncs: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        found = func(*args, **(kwargs or {}))
        if _on_host([*args, found]):
            return found
        if name in _READS:
            self.syncs[name] += 1
        if not (_is_view(func) or name in _MOVES_NO_DATA or "empty" in name):
            self.by_name[name] += 1
        return found

    @property
    def total(self) -> int:
        """Of all operators."""
        return self.by_name.total()


def _on_host(values: Iterable[Any]) -> bool:
    """Whether an operator works on the CPU's tensors alone, as one that draws a seed."""
    return all(value.device.type == "cpu" for value in values if isinstance(value, Tensor))


def _is_view(func: Any) -> bool:
    aliases = [found.alias_info for found in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


class FusedDropout(TorchFunctionMode):
    """Dropout as GPUs run it, in one launch with a mask of bytes; on other devices torch takes it apart."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.nn.functional.dropout:
            return func(*args, **(kwargs or {}))
        found = dict(zip(("input", "p", "training"), args, strict=False)) | (kwargs or {})
        if not found.get("training", True) or found.get("p", 0.5) == 0:
            return found["input"]
        return torch.native_dropout(found["input"], found.get("p", 0.5), True)[0]


class Saved:
    """The storages that the backward pass keeps alive; hold it until the pass is done.

    Args:
        parameters: Tensors that are in memory anyway.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        self.storages = {_storage(tensor): tensor for tensor in parameters}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Hook of `torch.autograd.graph.saved_tensors_hooks`."""
        key = _storage(tensor)
        if key not in self.storages:
            self.storages[key] = tensor  # alive, so that no other storage gets its address
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    @staticmethod
    def unpack(tensor: Tensor) -> Tensor:
        """Hook of the same."""
        return tensor


def _storage(tensor: Tensor) -> int:
    return int(tensor.untyped_storage()._cdata)


@contextmanager
def with_triton() -> Iterator[None]:
    """Meta tensors take the path of a GPU with Triton inside."""
    before, triton_linear.DEVICES = triton_linear.DEVICES, {"meta"}
    try:
        yield
    finally:
        triton_linear.DEVICES = before


class ReadsBackError(Exception):
    """Something of a step reads a value back from the device, which a meta tensor has not got."""


@contextmanager
def _nothing_is_read_back() -> Iterator[None]:
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if "meta tensor" not in str(error):
            raise
        own = [frame for frame in traceback.extract_tb(error.__traceback__) if "/moelora/" in frame.filename]
        at = own[-1].filename.rpartition("/moelora/")[2] + f":{own[-1].lineno}" if own else "somewhere"
        raise ReadsBackError(f"the host waits for the device: a value is read back at moelora/{at}.") from error


def count(module: torch.nn.Module, forward: Callable[[], Tensor]) -> Count:
    """Count one forward and backward pass.

    Args:
        module: What runs; its parameters and buffers are in memory anyway.
        forward: Gives the output, from which a gradient goes back.

    Raises:
        ReadsBackError: If something of the step reads a value back from the device.
    """
    saved = Saved([*module.parameters(), *module.buffers()])
    with _nothing_is_read_back(), FlopCounterMode(display=False, custom_mapping=_UNKNOWN_TO_TORCH) as flops:
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack), FusedDropout(), Launches() as there:
            output = forward()
        upstream = torch.empty_like(output)
        with Launches() as back:
            output.backward(upstream)
    for parameter in module.parameters():
        parameter.grad = None
    by_operator = flops.get_flop_counts().get("Global", {})
    products = sum(number for name, number in by_operator.items() if _ATTENTION not in str(name))
    syncs = there.syncs.total() + back.syncs.total()
    return Count(there.total, back.total, saved.bytes, products, syncs)


def graph_breaks(forward: Callable[[], Tensor]) -> int:
    """How often `torch.compile` has to leave its graph in a forward and backward pass."""
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    output = torch.compile(forward, backend="eager")()
    output.backward(torch.ones_like(output))
    return int(counters["graph_break"].total())
