"""Experts that are DoRAs, on one linear and in a feed-forward block.

Shape suffixes: T tokens, D input features, O output features, F inner features of a block, E experts, R rank of one
expert, K chosen experts of a token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.autocast import no_autocast
from moelora.ops.factors import Factors
from moelora.ops.feed_forward_parts import FrozenFeedForward
from moelora.ops.mixture_linear import mixture_linear
from moelora.routing.decision import Routing


@dataclass(frozen=True, eq=False)
class Dora:
    """What the experts make of one frozen linear: `c_e (W x + scaling B_e A_e x) + bias`.

    `c_e = m_e / ||W + scaling B_e A_e||`, a factor for each output feature, with the norms of rows. No gradient goes
    through the norms (DoRA, arXiv 2402.09353, section 4.3).

    Attributes:
        factors: A, B and the scaling.
        magnitude_EO: m.
        weight_OD: W.
        bias_O: The linear's bias, which no factor reaches.
    """

    factors: Factors
    magnitude_EO: Tensor
    weight_OD: Tensor
    bias_O: Tensor | None

    def c_EO(self) -> Tensor:
        """The factors c, fp32."""
        return self.magnitude_EO.float() / weight_norms(self.weight_OD, self.factors)

    def frozen_TO(self, x_TD: Tensor, y_TO: Tensor, dropped: bool) -> Tensor:
        """`W x`.

        Args:
            x_TD: What the experts see.
            y_TO: The linear's own output, of which it is taken unless `x_TD` differs from its input.
            dropped: Whether it does: then PEFT's DoRA, too, takes `(c - 1) W x` of what dropout left.
        """
        if dropped:
            return F.linear(x_TD.to(self.weight_OD.dtype), self.weight_OD)
        return y_TO if self.bias_O is None else y_TO - self.bias_O


@torch.no_grad()
def weight_norms(weight_OD: Tensor, factors: Factors | None = None) -> Tensor:
    """`||W + scaling B_e A_e||` of each row, [E, O] in fp32, without the sum for each expert.

    It is the root of `||w||^2 + 2 s b A w + s^2 b A A^T b`, with w and b the rows of W and B.

    Args:
        weight_OD: W.
        factors: The experts; without them it is the norms of W, [O], to the bit those of B = 0.
    """
    w_OD = weight_OD.float()
    squares_O = w_OD.square().sum(1)
    if factors is None:
        return squares_O.clamp_min(_LEAST).sqrt()
    a_ERD, b_EOR = factors.a_ERD.float(), factors.b_EOR.float() * factors.scaling
    with no_autocast(w_OD.device):
        seen_EOR = torch.einsum("od,erd->eor", w_OD, a_ERD)
        own_EOR = b_EOR @ (a_ERD @ a_ERD.transpose(1, 2))
        return (squares_O + ((2 * seen_EOR + own_EOR) * b_EOR).sum(-1)).clamp_min(_LEAST).sqrt()


_LEAST = 1e-24
"""A row of zeros has a norm all the same, so that a magnitude of 0 over it is 0."""


def dora_linear(x_TD: Tensor, y_TO: Tensor, dora: Dora, gates_TE: Tensor | None, dropped: bool = False) -> Tensor:
    """A mixture on one linear: `y + sum_e g_e ((c_e - 1) W x + c_e scaling B_e A_e x)`.

    With c in the rows of B it is a mixture of LoRAs, beside one product of the gates with c - 1. Equal to
    `reference.dora_linear`.

    Args:
        x_TD: Tokens, after LoRA dropout.
        y_TO: The frozen linear's output.
        dora: The experts.
        gates_TE: Their weights, fp32; None without a router (E = 1).
        dropped: Whether dropout changed `x_TD`.

    Returns:
        In the dtype of `y_TO`.
    """
    c_EO, factors = dora.c_EO(), dora.factors
    scaled = replace(factors, b_EOR=(factors.b_EOR * c_EO.unsqueeze(-1)).to(factors.b_EOR.dtype))
    delta_TO = mixture_linear(x_TD.to(factors.a_ERD.dtype), scaled, gates_TE)
    with no_autocast(x_TD.device):
        more_TO = c_EO - 1 if gates_TE is None else gates_TE @ (c_EO - 1)
    return y_TO + (more_TO * dora.frozen_TO(x_TD, y_TO, dropped) + delta_TO).to(y_TO.dtype)


def dora_feed_forward(
    x_TD: Tensor,
    routing: Routing,
    block: FrozenFeedForward,
    experts: Mapping[str, Dora],
    dropout: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """`sum_k w_k E_{e_k}(x)` with experts that are the whole block and a DoRA on some of its linears.

    `gate` and `up` run once for all experts, since a factor of a row stands behind the product. `down` runs for each
    choice: `c_e` differs between the experts, so that `sum_k w_k c_k W2 a_k` is not a product of `sum_k w_k a_k`. Equal
    to `reference.mixture_feed_forward` with magnitudes.

    Args:
        x_TD: Tokens.
        routing: Who computes them.
        block: The frozen block.
        experts: The experts on each linear, by its role.
        dropout: LoRA dropout, where it is active.

    Returns:
        y_TD in the dtype that the block's `down` gives.
    """
    up_TF, gate_TF = block.up(x_TD), None if block.gate is None else block.gate(x_TD)
    c_EO = {role: dora.c_EO() for role, dora in experts.items()}
    dropped_TD = x_TD if dropout is None else dropout(x_TD)

    def parts(role: str, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor] | None:
        """A linear's output, `W x` and `A_e x` [T, E, R]."""
        if role not in experts:
            return None
        dora = experts[role]
        factors = dora.factors
        return y, dora.frozen_TO(x, y, dropout is not None), factors.inner_TER(x.to(factors.a_ERD.dtype))

    def of_choice(role: str, found: tuple[Tensor, Tensor, Tensor], k: int) -> Tensor:
        """The linear's output of the tokens' k-th experts."""
        y, frozen, inner_TER = found
        factors = experts[role].factors
        if routing.ids_TK is None:
            c_TO, low_TO = c_EO[role][k], F.linear(inner_TER[:, k], factors.b_EOR[k])
        else:
            mask_TE1 = F.one_hot(routing.ids_TK[:, k], routing.num_experts).to(inner_TER.dtype).unsqueeze(-1)
            c_TO, low_TO = c_EO[role][routing.ids_TK[:, k]], (inner_TER * mask_TE1).flatten(1) @ factors.weight_MO()
        return y + ((c_TO - 1) * frozen + c_TO * (low_TO * factors.scaling)).to(y.dtype)

    up = parts("up", dropped_TD, up_TF)
    gate = None if gate_TF is None else parts("gate", dropped_TD, gate_TF)
    sum_TD: Tensor | None = None
    for k in range(routing.num_choices):
        up_k = up_TF if up is None else of_choice("up", up, k)
        gate_k = gate_TF if gate is None else of_choice("gate", gate, k)
        act_k = block.activate(up_k, gate_k)
        if block.hidden_dropout is not None:
            act_k = block.hidden_dropout(act_k)
        y_k = block.down(act_k)
        down = parts("down", act_k if dropout is None else dropout(act_k), y_k)
        if down is not None:
            y_k = of_choice("down", down, k)
        # summed in the weights' fp32: rounded weights of sum one would not give equal rows again
        weighted = y_k * routing.weights_TK[:, k : k + 1]
        sum_TD = weighted if sum_TD is None else sum_TD + weighted
    assert sum_TD is not None
    sum_TD = sum_TD.to(y_k.dtype)
    return sum_TD if block.output_dropout is None else block.output_dropout(sum_TD)
