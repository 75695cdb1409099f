"""Mixtures whose weights are known beforehand, as LoRAs.

Shape suffixes: N sequences, E experts, D input features, O output features, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import OpenAdapter, OpenSite
from moelora.export.output import Lora, concatenated
from moelora.routing.batch import Tokens

DISTIL = "Distil it to one LoRA (`--to lora --rank R`, moelora.export.distill_lora)"
"""What to do instead, in the words of an error."""


def mixed_loras(adapter: OpenAdapter, gates: Mapping[str, Tensor]) -> dict[str, Lora]:
    """The LoRA of each linear where every mixture has fixed weights; arguments as `weighted_parts`."""
    parts = weighted_parts(adapter, gates)
    alone = {name: each[0][1] for name, each in parts.items() if len(each) == 1 and each[0][0] == 1}
    return {name: alone[name] if name in alone else concatenated(each) for name, each in parts.items()}


def weighted_parts(adapter: OpenAdapter, gates: Mapping[str, Tensor]) -> dict[str, list[tuple[float, Lora]]]:
    """The experts on each linear with their weights, by the linear's name; those of weight 0 are left out.

    Args:
        adapter: The adapter.
        gates: The weights [E] of each site's experts, by the site's name. Those of a feed-forward block are taken as
            they are for each of its linears: exact only where one of them is 1 and the rest 0.
    """
    parts = {}
    for site in adapter.sites:
        weights = [1.0] if site.router is None else gates[site.name].tolist()
        for role, factors in site.factors.items():
            experts = zip(weights, factors.expanded_a_ERD(), factors.b_EOR, strict=True)
            found = [(weight, Lora(a_RD, b_OR, factors.scaling)) for weight, a_RD, b_OR in experts if weight != 0]
            if found:
                parts[site.linears[role]] = found
    return parts


def fixed_gates(adapter: OpenAdapter) -> dict[str, Tensor] | None:
    """The weights [E] of each site's experts where they are the same for every token, by the site's name; else None."""
    if adapter.config.needs or (adapter.routed and not ignores_input(adapter.config)):
        return None
    return {site.name: gates_of_zeros(site, Tokens(torch.ones(1, 1) > 0))[0] for site in adapter.routed}


def ignores_input(config: MoeLoraConfig) -> bool:
    """Whether a router's weights do not depend on the input of its layer."""
    return bool(config.scores.ignores_input and config.selection.ignores_input)


def gates_of_zeros(site: OpenSite, tokens: Tokens) -> Tensor:
    """The weights [N, E] that a router gives to N sequences of one token each, of which it sees the batch's facts only.

    Args:
        site: A site with a router.
        tokens: The tokens; the layer's input is zeros.
    """
    router = site.router
    assert router is not None
    device = next((tensor.device for tensor in router.parameters()), torch.device("cpu"))
    was_training = router.training
    router.eval()
    try:
        with torch.no_grad():
            gates_NE: Tensor = router(torch.zeros(len(tokens.valid_T), site.features, device=device), tokens).gates_TE()
    finally:
        router.train(was_training)
    return gates_NE.float().cpu()


def check_block(site: OpenSite, gates_E: Tensor) -> None:
    """Refuse weights of whole feed-forward blocks, unless they choose one."""
    if site.is_block and not is_one(gates_E):
        weights = ", ".join(f"{gate:.3g}" for gate in gates_E.tolist())
        raise ExportError(
            f"{site.name!r} is a sum of whole feed-forward blocks with the weights {weights}, which is no LoRA; "
            f"allowed: one expert with weight 1. {DISTIL}."
        )


def is_one(gates_E: Tensor) -> bool:
    """Whether one expert has weight 1 and the others 0."""
    return bool((gates_E == 1).sum() == 1 and (gates_E != 0).sum() == 1)
