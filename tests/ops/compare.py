"""Comparing an operation with its reference: forward, and the gradient of every input."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def assert_close(name: str, actual: Tensor, expected: Tensor, *, rtol: float, atol: float) -> None:
    """`torch.testing.assert_close` across dtypes, with the tensor's name in the message."""
    torch.testing.assert_close(
        actual.double(), expected.double(), rtol=rtol, atol=atol, msg=lambda text: f"{name}: {text}"
    )


def assert_near(name: str, actual: Tensor, expected: Tensor, ratio: float) -> None:
    """The error's norm is at most `ratio` of the expected norm: the measure for half precision."""
    error = (actual.double() - expected.double()).norm() / expected.double().norm().clamp_min(1e-12)
    assert error <= ratio, f"{name}: relative error {error:.2e}, allowed {ratio:.2e}"


def gradients(function: Callable[[], Tensor], leaves: dict[str, Tensor], seed: int = 5) -> dict[str, Tensor]:
    """Run `function` and its backward pass from a random upstream gradient.

    Args:
        function: Computes the output from the leaves.
        leaves: Tensors by name; their `grad` is set to None first.
        seed: Seed of the upstream gradient.

    Returns:
        The output as "output" and the gradient of each leaf; a leaf that got none fails.
    """
    for leaf in leaves.values():
        leaf.grad = None
    output = function()
    upstream = torch.randn(output.shape, generator=torch.Generator("cpu").manual_seed(seed), device="cpu")
    output.backward(upstream.to(output))
    found = {"output": output.detach()}
    for name, leaf in leaves.items():
        assert leaf.grad is not None, f"{name} got no gradient"
        found[name] = leaf.grad.detach().clone()
    return found
