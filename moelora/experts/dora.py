"""Experts that are DoRAs (MixDoRA).

Shape suffixes: E experts, R rank of one expert, T tokens, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from moelora.choices import Init, Param, Site, register
from moelora.experts.base import ExpertInput
from moelora.experts.lora import LoraExperts
from moelora.ops import reference
from moelora.ops.dora import Dora, dora_feed_forward, dora_linear, weight_norms
from moelora.ops.feed_forward_parts import Dense, FrozenFeedForward
from moelora.routing.decision import Routing
from moelora.tensors import AdapterTensors
from moelora.validation import check

_MAGNITUDE = "M"


@register
@dataclass(frozen=True, kw_only=True)
class DoraExperts(LoraExperts):
    """An expert is a DoRA (arXiv 2402.09353), as PEFT's: LoRA gives the direction of W's rows, m_e their length.

        m_e (W x + scaling B_e A_e x) / ||W + scaling B_e A_e|| + bias

    The norms are those of rows and have no gradient. m starts at the norms of W, is trained in fp32 and saved. With
    dropout W, too, sees what it leaves in what an expert adds to the frozen linear's output, as in PEFT.

    The fields are those of `LoraExperts`.
    """

    kind: ClassVar[str] = "dora"
    is_low_rank: ClassVar[bool] = False
    lora_name: ClassVar[str] = "DoRA"

    def check(self, config: Any) -> None:
        """Refuse whole blocks without a weight, and the compiled form.

        Raises:
            ConfigError: With the reason.
        """
        check(
            not config.placement.wraps_moe_blocks,
            "placement",
            config.placement.describe(),
            "linears or feed-forward blocks, with 'dora' experts",
            "A block that is wrapped whole has no weight, whose norms they need.",
        )
        check(
            config.compute.kind != "compiled",
            "compute",
            config.compute.kind,
            "'fast' or 'reference' with 'dora' experts",
            "The compiled loops pass the last linear of a block once for all experts, and each expert scales its rows "
            "in its own way.",
        )

    def params(self, site: Site) -> list[Param]:
        """Beside A and B of each linear its magnitudes [E, O]."""
        magnitudes = [
            Param(
                f"{_MAGNITUDE}.{role or 'weight'}",
                (site.num_experts, out_features),
                Init("base"),
                dtype=torch.float32,
                num_frozen=self.num_frozen,
            )
            for role, (_, out_features) in site.linears.items()
        ]
        return [*super().params(site), *magnitudes]

    def start(self, parts: Mapping[str, AdapterTensors], dense: Callable[[], Dense]) -> None:
        """See `Experts.start`: the norms of the rows of W."""
        held = parts[_MAGNITUDE]
        tensors = {name: held.get_parameter(name) for name in held.declared}
        if any(tensor.is_meta for tensor in tensors.values()):
            return  # they are about to be loaded
        linears = dense()
        for name, tensor in tensors.items():
            role = name.removesuffix("_frozen")
            weight_OD, _ = linears["" if role == "weight" else role]
            if not weight_OD.is_meta:
                tensor.data.copy_(weight_norms(weight_OD).expand_as(tensor))

    def apply(self, given: ExpertInput) -> Tensor:
        """See `Experts.apply`.

        Raises:
            ConfigError: If a block trains with dropout, of which the reference draws none, and it is asked for.
        """
        x, block, dropout = given.x, given.block, given.dropout
        drops = dropout.training and dropout.p > 0
        naive = given.compute.kind == "reference"
        experts, x_TD = self._experts(given), x.reshape(-1, x.shape[-1])
        if block is None:
            y = given.base(x)
            gates_TE = given.route(x).gates_TE() if given.site.routed else None
            seen_TD = dropout(x_TD) if drops else x_TD
            y_TO = (_naive_linear if naive else dora_linear)(seen_TD, y.flatten(0, -2), experts[""], gates_TE, drops)
            return y_TO.view(y.shape)
        check(not naive or not drops, "compute", "reference", "'fast' in training with dropout", "It draws none.")
        routing = given.route(x)
        if naive:
            y_TD = _naive_feed_forward(x_TD, routing, block, experts, given.dense())
        else:
            y_TD = dora_feed_forward(x_TD, routing, block, experts, dropout if drops else None)
        return y_TD.view(*x.shape[:-1], y_TD.shape[-1])

    def _experts(self, given: ExpertInput) -> dict[str, Dora]:
        """The experts on each linear that has any."""
        found = {}
        for role, (weight_OD, bias_O) in given.dense().items():
            factors = self.factors(given.parts, role, given.scaling)
            if factors is not None:
                magnitude_EO = given.tensor(f"{_MAGNITUDE}.{role or 'weight'}")
                found[role] = Dora(factors, magnitude_EO, weight_OD, bias_O)
        return found


def _naive_linear(x_TD: Tensor, y_TO: Tensor, dora: Dora, gates_TE: Tensor | None, dropped: bool) -> Tensor:
    """`dora_linear` by its reference."""
    a_ERD, b_EOR, scaling = dora.factors.a_ERD, dora.factors.b_EOR, dora.factors.scaling
    more_TO = reference.dora_linear(x_TD, dora.weight_OD, a_ERD, b_EOR, dora.magnitude_EO, gates_TE, scaling)
    return (y_TO + more_TO).to(y_TO.dtype)


def _naive_feed_forward(
    x_TD: Tensor, routing: Routing, block: FrozenFeedForward, experts: Mapping[str, Dora], dense: Dense
) -> Tensor:
    """`dora_feed_forward` by its reference."""
    loras = {role: (dora.factors.a_ERD, dora.factors.b_EOR, dora.factors.scaling) for role, dora in experts.items()}
    magnitudes = {role: dora.magnitude_EO for role, dora in experts.items()}
    y_TD = reference.mixture_feed_forward(
        x_TD, routing.gates_TE(), dense, loras, block.kind, block.activation, magnitudes
    )
    return y_TD.to(x_TD.dtype)
