"""Moving the routers' biases of a model after a training forward."""

from __future__ import annotations

import torch
import torch.distributed as dist

from moelora.balance.totals import world_size
from moelora.routing.record import ModelRun
from moelora.routing.run import RunHooks


def move_biases(hooks: RunHooks, run: ModelRun) -> None:
    """Move all biases by the loads of a run, with one sum over the processes.

    Every process has the same list of biases; a mixture that did not run here adds zeros.

    Args:
        hooks: The model's hooks, which know its layers.
        run: A training forward that has ended.
    """
    biases = {mixture: (layer, bias) for layer in hooks.layers for mixture, bias in layer.moving_biases().items()}
    if not biases:
        return
    device = next(iter(biases.values()))[1].device
    loads = [run.loads.get(mixture, torch.zeros_like(bias)) for mixture, (_, bias) in biases.items()]
    flat = torch.cat([load_E.to(device, torch.float32) for load_E in loads])
    if world_size() > 1:
        dist.all_reduce(flat)
    summed = flat.split([len(load_E) for load_E in loads])
    for ((_, adapter), (layer, _)), load_E in zip(biases.items(), summed, strict=True):
        layer.move_bias(adapter, load_E)
