"""A frozen feed-forward block with experts, tokens and their routing, for the fast operation and for the reference.

Shape suffixes: T tokens, D model features, F inner features, E experts, R rank of one expert, K chosen experts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from moelora.ops import reference
from moelora.ops.activation_vjp import activation_vjp
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FeedForwardExperts, FrozenFeedForward
from moelora.ops.mixture_feed_forward import Form, choose_form, mixture_feed_forward
from moelora.routing.decision import Routing
from tests.ops.compare import assert_close, gradients

SCALINGS = {"up": 1.3, "gate": 0.7, "down": 1.1}

ROLES = {"gated": ("gate", "up", "down"), "plain": ("up", "down"), "fused": ("up", "down")}

SOME_ROLES = [
    ("gated", ("gate",)),
    ("gated", ("up",)),
    ("gated", ("down",)),
    ("gated", ("gate", "up")),
    ("gated", ("gate", "down")),
    ("gated", ("up", "down")),
    ("plain", ("up",)),
    ("plain", ("down",)),
    ("fused", ("up",)),
    ("fused", ("down",)),
]
"""Kinds of blocks with experts on some of their linears alone."""


class Case:
    """A frozen block, its experts, tokens and their routing, computable by the fast operation and by the reference."""

    def __init__(
        self,
        kind: str,
        *,
        T: int = 7,
        D: int = 12,
        F: int = 20,
        E: int = 3,
        R: int = 3,
        K: int | None = 2,
        roles: tuple[str, ...] | None = None,
        activation: nn.Module | None = None,
        dtype: torch.dtype = torch.float32,
        expert_dtype: torch.dtype | None = None,
        renormalize: bool = False,
        shared_a: bool = False,
        bias: bool | None = None,
    ) -> None:
        bias = kind != "gated" if bias is None else bias
        sizes = {"gate": (D, F), "up": (D, 2 * F if kind == "fused" else F), "down": (F, D)}
        self.kind = kind
        self.activation = activation or nn.SiLU()
        self.linears = {role: nn.Linear(*sizes[role], bias=bias).to(dtype) for role in ROLES[kind]}
        for linear in self.linears.values():
            linear.requires_grad_(False)
        self.factors: dict[str, Factors] = {}
        self.leaves: dict[str, Tensor] = {"x": torch.randn(T, D).to(dtype).requires_grad_()}
        for role in ROLES[kind] if roles is None else roles:
            inputs, outputs = sizes[role]
            a_ERD = (torch.randn(1 if shared_a else E, R, inputs) * 0.5).to(expert_dtype or dtype).requires_grad_()
            b_EOR = (torch.randn(E, outputs, R) * 0.5).to(expert_dtype or dtype).requires_grad_()
            self.factors[role] = Factors(a_ERD, b_EOR, SCALINGS[role])
            self.leaves |= {f"{role}_a": a_ERD, f"{role}_b": b_EOR}
        chosen = E if K is None else K
        weights_TK = torch.rand(T, chosen) + 0.1
        if renormalize:
            weights_TK = weights_TK / weights_TK.sum(-1, keepdim=True)
        self.leaves["weights"] = weights_TK.requires_grad_()
        self.ids_TK = None if K is None else torch.rand(T, E).topk(K).indices
        self.sums_to_one = renormalize
        self.kept_TK = torch.ones(T, chosen)
        self.scores_TE = torch.rand(T, E)
        self.dropout: Callable[[Tensor], Tensor] | None = None

    def routing(self) -> Routing:
        weights_TK = self.leaves["weights"] * self.kept_TK
        return Routing(self.scores_TE, self.scores_TE, weights_TK, self.ids_TK, sums_to_one=self.sums_to_one)

    def forms(self) -> tuple[Form, ...]:
        if len(self.leaves["x"]) == 0:
            grouped: tuple[Form, ...] = ()
        else:
            grouped = ("grouped",)
        if self.ids_TK is None:
            return ("masked", *grouped)
        known = activation_vjp(self.activation).vjp is not None
        return ("gathered", "segments", "masked", *grouped, *(("compiled",) if known else ()))

    def block(self) -> FrozenFeedForward:
        return FrozenFeedForward(
            kind=self.kind,
            up=self.linears["up"],
            down=self.linears["down"],
            activation=self.activation,
            gate=self.linears.get("gate"),
            down_bias=self.linears["down"].bias,
        )

    def experts(self) -> FeedForwardExperts:
        up, down, gate = (self.factors.get(role) for role in ("up", "down", "gate"))
        return FeedForwardExperts(up, down, gate, self.dropout)

    def fast(self, form: Form | None = None) -> Tensor:
        return mixture_feed_forward(self.leaves["x"], self.routing(), self.block(), self.experts(), form)

    def chosen(self, compiled: bool = False) -> Form:
        """The form that is chosen for this case."""
        return choose_form(self.leaves["x"], self.routing(), self.block(), self.experts(), compiled)

    def kept_wide(self, form: Form) -> tuple[Tensor, int]:
        """The output, and how many tensors of at least [T, F] its backward pass keeps beside weights and leaves."""
        saved: dict[int, Tensor] = {}

        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage().data_ptr()] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            y_TD = self.fast(form)
        params = [*self.leaves.values(), *(linear.weight for linear in self.linears.values())]
        known = {param.untyped_storage().data_ptr() for param in params}
        size = len(self.leaves["x"]) * self.linears["down"].in_features
        wide = [x for key, x in saved.items() if key not in known and x.is_floating_point() and x.numel() >= size]
        return y_TD, len(wide)

    def frozen(self) -> Tensor:
        """The block's own forward, without experts."""
        up = self.linears["up"](self.leaves["x"])
        if self.kind == "gated":
            hidden = self.activation(self.linears["gate"](self.leaves["x"])) * up
        elif self.kind == "fused":
            gate_half, up_half = up.chunk(2, dim=-1)
            hidden = self.activation(gate_half) * up_half
        else:
            hidden = self.activation(up)
        y_TD: Tensor = self.linears["down"](hidden)
        return y_TD

    def naive(self) -> Tensor:
        linears = {role: (linear.weight, linear.bias) for role, linear in self.linears.items()}
        loras = {role: (f.a_ERD, f.b_EOR, f.scaling) for role, f in self.factors.items()}
        return reference.mixture_feed_forward(
            self.leaves["x"], self.routing().gates_TE(), linears, loras, self.kind, self.activation
        )

    def check(self, rtol: float = 1e-5) -> None:
        naive = gradients(self.naive, self.leaves)
        for form in self.forms():
            fast = gradients(partial(self.fast, form), self.leaves)
            for name, expected in naive.items():
                atol = rtol * float(expected.abs().max())
                assert_close(f"{form}: {name}", fast[name], expected, rtol=rtol, atol=atol)
