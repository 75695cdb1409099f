"""Moving the routers' biases of a model after a training forward.

Shape suffixes: L routers, E experts.
"""

from __future__ import annotations

from typing import Any

import torch

from moelora.balance.totals import RoutingTotals
from moelora.routing.record import ModelRun
from moelora.routing.run import RunHooks
from moelora.routing.stack import stack_records


@torch.no_grad()
def move_biases(hooks: RunHooks, run: ModelRun) -> None:
    """Move all biases by the loads of a run, with one sum over the processes.

    Every process has the same list of biases; a mixture that did not run here adds zeros. The values that the forward
    used stay as they are, for its backward.

    Args:
        hooks: The model's hooks, which know its layers.
        run: A training forward that has ended.
    """
    biases: dict[Any, Any] = {}
    groups: dict[Any, list[Any]] = {}
    for layer in hooks.layers:
        for mixture, bias in layer.moving_biases().items():
            biases[mixture] = bias
            choices = tuple(choice for choice in layer.configs[mixture[1]].balance if choice.moves_bias)
            groups.setdefault((choices, len(bias), bias.device), []).append(mixture)
    if not biases:
        return
    stacks = stack_records([record for record in run.moving if record.mixture in biases])
    sizes = {mixture: len(bias) for mixture, bias in biases.items()}
    totals = RoutingTotals.of(stacks, sizes, sums=False).all_reduce(next(iter(biases.values())).device)
    for (choices, _, device), mixtures in groups.items():
        load_LE = totals.of_mixtures(mixtures, device).counts_LE
        moved = [biases[mixture].data for mixture in mixtures]
        for choice in choices:
            moved = list(torch._foreach_add(moved, list(choice.move(load_LE).unbind())))
        for mixture, value in zip(mixtures, moved, strict=True):
            biases[mixture].data = value
