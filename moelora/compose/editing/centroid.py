"""The key of an expert in a mixture that is routed by centroids.

Shape suffixes: N sequences, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from moelora.errors import ComposeError
from moelora.routing.batch import Batch
from moelora.routing.prompts import derive, prompt_mean


@torch.no_grad()
def fit_centroid(
    base: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    embedding: str = "hidden",
    turn_start: Sequence[int] = (),
) -> Tensor:
    """The mean embedding [1, D] of the prompts of some rows, in fp32: the centroid of the expert that is for them.

    Args:
        base: The base model without an adapter, as `CentroidScores` sees it.
        batches: Inputs of its forward; where they have labels, the prompt is what comes before the first one.
        embedding: "hidden" or "input", as in `CentroidScores`.
        turn_start: Token ids that open a turn of the user, as in `CentroidScores`.

    Raises:
        ComposeError: If there is no row.
    """
    fact = prompt_mean(embedding, turn_start)
    training = base.training
    base.eval()
    try:
        found = [
            derive(base, (), batch, Batch.of_call(base, (), batch, None, {}), frozenset({fact}), _call)[fact]
            for batch in batches
        ]
    finally:
        base.train(training)
    if not found:
        raise ComposeError("there is no row to fit a centroid on; allowed: at least one.")
    return torch.cat(found).mean(0, keepdim=True)


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return module(**inputs)
