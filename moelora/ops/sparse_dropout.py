"""LoRA dropout that draws where the zeros are, not whether each element is one.

LoRA's usual dropout is 0.05: a random number for each element is twenty for each zero, and on a CPU drawing them took
longer than LoRA's own matrix products.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# Above it there are so many zeros that a number for each element costs as much.
_SPARSE = 0.25
# Below it gaps are longer than numbers of double precision tell apart.
_LEAST = 1e-6


class LoraDropout(nn.Dropout):
    """`nn.Dropout` by `dropout`: the same distribution from other random numbers."""

    def forward(self, input: Tensor) -> Tensor:
        """Zero elements at random in training."""
        return dropout(input, self.p) if self.training else input


def dropout(x: Tensor, p: float) -> Tensor:
    """Inverted dropout: each element is 0 with probability `p`, else `x / (1 - p)`, all independent.

    On a CPU and at a small `p` the gaps between zeros are drawn, which are geometric: `floor(X)` of an exponential `X`
    of rate `-ln(1 - p)`, and 1. Elsewhere, and where a graph is recorded, it is `torch.nn.functional.dropout`.

    Args:
        x: Any shape.
        p: From 0 to 1.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
    # a subclass has values of its own, or none
    if not _LEAST <= p <= _SPARSE or x.device.type != "cpu" or is_traced or type(x) not in (Tensor, nn.Parameter):
        return F.dropout(x, p)
    zeroed: Tensor = _Zeroed.apply(x, zeros(x.numel(), p), 1 / (1 - p))
    return zeroed


def zeros(n: int, p: float) -> Tensor:
    """Which of `n` elements are dropped, each with probability `p`, in rising order; int64.

    Args:
        n: Number of elements.
        p: Between 0 and 1.
    """
    expected = n * p
    parts, last = [], -1
    while last < n:
        # six standard deviations more than expected: one draw is enough but once in a billion
        gaps = torch.empty(int(expected + 6 * math.sqrt(expected)) + 16, dtype=torch.float64, device="cpu")
        places = gaps.exponential_(-math.log1p(-p)).long().add_(1).cumsum(0).add_(last)
        parts.append(places)
        last = int(places[-1])
    places = parts[0] if len(parts) == 1 else torch.cat(parts)
    return places[: int(torch.searchsorted(places, n))]


class _Zeroed(torch.autograd.Function):
    """`scale * x` with zeros; what is kept for the backward pass is where they are."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(places)
        ctx.scale = scale
        return _with_zeros(x, places, scale)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _with_zeros(grads[0], places, ctx.scale), None, None


def _with_zeros(x: Tensor, places: Tensor, scale: float) -> Tensor:
    y = (x * scale).contiguous()
    y.view(-1).index_fill_(0, places, 0)
    return y
