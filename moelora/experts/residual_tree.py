"""A tree of low-rank residuals (S'MoRE).

Shape suffixes: T tokens, C chains of nodes from the root, S experts of a layer of the tree, R rank of one, D input
features, O output features, I and J features of a node below and above.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput, Experts
from moelora.scores.tree import by_level, check_sizes, num_edges
from moelora.validation import check, check_choice, is_count, is_positive, is_share

Activation = Literal["tanh", "relu", "identity"]
Position = Literal["all", "child"]


@register
@dataclass(frozen=True, kw_only=True)
class ResidualTreeExperts(Experts):
    """S'MoRE (arXiv 2504.06426): experts are residuals of layers, put together down a tree that is routed per token.

        x_{l+1}^i = sum_{n of i} a_l^{i,n} act(B_l^n A_l^n x + W_l x_l^n),   y = W0 x + scaling * W_proj x_L

    the sum over the chosen children n of the node i; x_0 is nothing. With `position="child"` it is
    `sum_n (a_l^{i,n} B_l^n A_l^n x + W_l act(x_l^n))`. A node of layer l has d_l features, `d_{l+1} = d_l + s_l r`,
    `d_0 = 0`. W_proj starts at 0, the rest kaiming.

    Args:
        num_experts: The number of edges of the tree, see `moelora.scores.tree`.
        sizes: s, the number of experts in each layer, leaves first.
        r: Rank of one expert.
        alpha: The scaling is `alpha / r`; None is 1.
        lora_dropout: As of `LoraExperts`.
        activation: act.
        position: Where the scores stand: around all of a child, or at its own residual alone.

    Raises:
        ConfigError: For a value out of range.
    """

    kind: ClassVar[str] = "residual_tree"

    num_experts: int = 20
    sizes: list[int] = field(default_factory=lambda: [4, 4])
    r: int = 4
    alpha: float | None = None
    lora_dropout: float = 0.0
    activation: Activation = "tanh"
    position: Position = "all"

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", check_sizes("sizes", self.sizes))
        E = num_edges(self.sizes)
        check(self.num_experts == E, "experts.num_experts", self.num_experts, f"{E}, the edges of the tree")
        check(is_count(self.r), "r", self.r, "an integer of at least 1")
        alpha = self.alpha
        check(alpha is None or is_positive(alpha), "lora_alpha", alpha, "a positive number, or None")
        check(is_share(self.lora_dropout), "lora_dropout", self.lora_dropout, "0 <= lora_dropout < 1")
        check_choice("activation", self.activation, Activation)
        check_choice("position", self.position, Position)

    @property
    def scaling(self) -> float:
        """The factor of `W_proj x_L`."""
        return 1.0 if self.alpha is None else self.alpha / self.r

    def check(self, config: Any) -> None:
        """Refuse routing that is not down the same tree, and sites without a router.

        Raises:
            ConfigError: With the reason.
        """
        given = config.selection
        same = given.kind == "tree_top" and given.sizes == self.sizes
        check(same, "selection", given.describe(), f"'tree_top' of the sizes {self.sizes} with 'residual_tree' experts")
        placement = config.placement
        fits = placement.kind == "linear" and placement.unrouted_modules is None
        check(
            fits, "placement", placement.describe(), "'linear' without unrouted_modules, with 'residual_tree' experts"
        )

    def params(self, site: Site) -> list[Param]:
        """A [S, R, D] and B [S, J, R] of each layer, W [J, I] of each but the first, and `W.proj` [O, d_L]."""
        in_features, out_features = site.linears[""]
        kaiming, params, below = Init("kaiming"), [], 0
        for layer, size in enumerate(self.sizes):
            above = below + size * self.r
            params += [
                Param(f"A.layer_{layer}", (size, self.r, in_features), kaiming),
                Param(f"B.layer_{layer}", (size, above, self.r), kaiming),
                *([Param(f"W.layer_{layer}", (above, below), kaiming)] if layer else []),
            ]
            below = above
        return [*params, Param("W.proj", (out_features, below), Init("zeros"))]

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`."""
        routing = given.route(given.x)
        proj = given.tensor("W.proj")
        alphas, chosen = (by_level(each, self.sizes) for each in (routing.gates_TE(), _assigned(routing)))
        x_TD = given.dropout(given.x.to(proj.dtype)).flatten(0, -2)
        nodes: Tensor | None = None
        for layer in range(len(self.sizes)):
            a_SRD, b_SJR = given.tensor(f"A.layer_{layer}"), given.tensor(f"B.layer_{layer}")
            own_TSJ = torch.einsum("tsr,sjr->tsj", torch.einsum("td,srd->tsr", x_TD, a_SRD), b_SJR).unsqueeze(1)
            alpha = alphas[layer].to(own_TSJ.dtype).unsqueeze(-1)
            if self.position == "all":
                if nodes is not None:
                    own_TSJ = own_TSJ + self._below(given, layer, nodes)
                nodes = (alpha * self._act(own_TSJ)).sum(2)
                continue
            made = alpha * own_TSJ
            if nodes is not None:
                made = made + chosen[layer].to(made.dtype).unsqueeze(-1) * self._below(given, layer, self._act(nodes))
            nodes = made.sum(2)
        assert nodes is not None
        y = given.base(given.x)
        return (y + given.scaling * F.linear(nodes[:, 0], proj).view(y.shape)).to(y.dtype)

    def _below(self, given: ExpertInput, layer: int, nodes_TCI: Tensor) -> Tensor:
        """`W_l x_l^n` [T, C, S, J] of the children."""
        return F.linear(nodes_TCI, given.tensor(f"W.layer_{layer}")).unflatten(1, (-1, self.sizes[layer]))

    def _act(self, x: Tensor) -> Tensor:
        if self.activation == "identity":
            return x
        return x.tanh() if self.activation == "tanh" else x.relu()


def _assigned(routing: Any) -> Tensor:
    assigned: Tensor = routing.assigned_TK
    return assigned
