"""The compiled loops: the real compiler, and what happens without one."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn

from moelora.ops import compiled_kernels
from tests.ops.compare import assert_close, gradients
from tests.ops.feed_forward_case import Case

IGNORED = pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated:DeprecationWarning")


@IGNORED
@pytest.mark.parametrize("kind", ["gated", "plain"])
def test_compiler_gives_the_reference(kind: str) -> None:
    """The real compiler; each kind at two lengths, of which the second takes the code made for the first."""
    for tokens in (63, 96):
        case = Case(kind, T=tokens, E=8, R=3, K=2)
        fast, naive = gradients(partial(case.fast, "compiled"), case.leaves), gradients(case.naive, case.leaves)
        for name, expected in naive.items():
            atol = 1e-5 * float(expected.abs().max())
            assert_close(name, fast[name], expected, rtol=1e-5, atol=atol)
    assert compiled_kernels.compiler_works()


def test_a_broken_compiler_is_said_and_the_result_is_right(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no C++ compiler was found")

    monkeypatch.setattr(compiled_kernels._Compiled, "failure", None)
    monkeypatch.setattr(torch, "compile", broken)
    compiled_kernels._loops.cache_clear()
    case = Case("gated", T=63, E=3)
    with pytest.warns(RuntimeWarning, match=r"does not work here \(RuntimeError: no C\+\+ compiler was found\)"):
        actual = case.fast("compiled")
    assert_close("y", actual, case.naive(), rtol=1e-5, atol=1e-5)
    assert not compiled_kernels.compiler_works()
    chosen = case.chosen(compiled=True)
    assert chosen == "segments"


def test_compiled_operations_are_chosen_where_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_kernels._Compiled, "failure", None)
    case = Case("gated", T=63, E=3)
    assert case.chosen() == "segments"
    assert case.chosen(compiled=True) == "compiled"
    unknown = Case("gated", T=63, E=3, activation=nn.Tanh())
    assert unknown.chosen(compiled=True) == "segments"
