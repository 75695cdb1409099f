"""Dropout that draws where the zeros are, beside what dropout is."""

from __future__ import annotations

import math

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from moelora.ops.sparse_dropout import LoraDropout, dropout, zeros


@pytest.mark.parametrize("p", [0.01, 0.05, 0.25, 0.4])
def test_what_is_zero_and_what_is_not(p: float) -> None:
    torch.manual_seed(0)
    x = torch.rand(300, 40, dtype=torch.float64) + 1
    y = dropout(x, p)
    kept = y != 0
    torch.testing.assert_close(y[kept], x[kept] / (1 - p))
    # within four standard deviations of the expected share
    assert abs(float((~kept).double().mean()) - p) < 4 * math.sqrt(p * (1 - p) / x.numel())


def test_every_element_is_dropped_alike_and_alone() -> None:
    """Over many draws: the first and the last element as often as any, and two neighbours independently."""
    torch.manual_seed(1)
    draws, n, p = 20_000, 5, 0.2
    dropped = torch.zeros(draws, n)
    for row in dropped:
        row[zeros(n, p)] = 1
    deviation = math.sqrt(p * (1 - p) / draws)
    assert (dropped.mean(0) - p).abs().max() < 4 * deviation
    together = (dropped[:, :, None] * dropped[:, None]).mean(0)
    apart = together[~torch.eye(n, dtype=torch.bool)]
    assert (apart - p * p).abs().max() < 4 * math.sqrt(p**2 / draws)


def test_one_draw_too_few_goes_on_from_the_last_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    monkeypatch.setattr("moelora.ops.sparse_dropout.math.sqrt", lambda x: -x / 6)  # no more gaps than the least
    found = zeros(4000, 0.1)
    assert bool((found.diff() > 0).all())
    assert int(found[0]) >= 0
    assert int(found[-1]) < 4000
    assert 300 < len(found) < 500


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_that_of_the_same_mask(dtype: torch.dtype) -> None:
    torch.manual_seed(3)
    x = torch.randn(6, 50, dtype=dtype).t().requires_grad_()  # not contiguous
    y = dropout(x, 0.2)
    grad = torch.randn_like(y)
    (found,) = torch.autograd.grad(y, x, grad)
    expected = grad * (y != 0) * (1 / 0.8)
    torch.testing.assert_close(found, expected)
    assert found.shape == x.shape


def test_autograd_checks_it() -> None:
    def seeded(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(4)
        return dropout(x, 0.2) ** 2

    assert torch.autograd.gradcheck(seeded, torch.randn(5, 4, dtype=torch.float64, requires_grad=True))


def test_where_it_is_torchs_own() -> None:
    x = torch.randn(50, 8)
    for p in (0.5, 1.0, 0.0):
        torch.manual_seed(5)
        found = dropout(x, p)
        torch.manual_seed(5)
        assert torch.equal(found, F.dropout(x, p))
    assert dropout(torch.empty(3, 2, device="meta"), 0.1).is_meta
    with FakeTensorMode() as fake:
        assert dropout(fake.from_tensor(x), 0.1).shape == x.shape
    with torch.device("meta"):  # a default device is not that of the input
        assert not dropout(x, 0.1).is_meta
    assert dropout(x, 1e-20).shape == x.shape
    dropout(x.clone().requires_grad_(), 0.1).mul_(2).sum().backward()  # the output is no view
    compiled = torch.compile(lambda x: dropout(x, 0.1), fullgraph=True, backend="eager")
    assert compiled(x).shape == x.shape
    module = LoraDropout(0.1)
    assert module.eval()(x) is x
    assert (module.train()(x) == 0).any()
    assert dropout(x[:0], 0.1).shape == (0, 8)
