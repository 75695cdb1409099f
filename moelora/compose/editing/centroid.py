"""The key of an expert in a mixture that is routed by centroids.

Shape suffixes: N sequences, D features.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from moelora.choices import read
from moelora.compose.editing.stacked import StackedAdapter, read_stacked
from moelora.compose.routers.centroids import Centroids
from moelora.errors import ComposeError
from moelora.routing.batch import Batch
from moelora.routing.prompts import derive, prompt_mean

_NOT_OF_A_RECIPE = ("rows", "data")


def fit_rows(
    base: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str | Path, name: str = "new"
) -> dict[str, Tensor]:
    """What a new expert needs in the router of a mixture that is routed by centroids: `rows` of `add_experts`.

    That is its centroid, see `fit_centroid`, and where the mixture has thresholds its own, by the rule and with the
    words that the mixture was composed with (see `moelora.compose.routers.Centroids`). A warning says where the
    threshold refuses most of these rows.

    Args:
        base: The base model without an adapter.
        batches: Inputs of its forward, of rows that the new expert is for.
        adapter: Folder of the mixture.
        name: What warnings and errors call the new expert.

    Returns:
        `centroids` [1, D], and `threshold` [1, 1] where the mixture has thresholds.

    Raises:
        ComposeError: If the mixture is not routed by centroids or does not fit the base, there is no row, or there is
            one alone and the mixture has thresholds.
    """
    old = read_stacked(adapter)
    scores = old.config.scores
    if scores.kind != "centroids":
        raise ComposeError(
            f"{str(adapter)!r} has {scores.kind!r} scores, which are not found from rows of a new expert; allowed: a "
            "mixture routed by centroids."
        )
    h_ND = _embed(base, batches, scores.embedding, scores.turn_start)
    if h_ND.shape[1] != scores.features:
        of = getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
        raise ComposeError(
            f"{str(adapter)!r} does not fit the base model {of!r}: its centroids have {scores.features} features, and "
            f"the base's embeddings {h_ND.shape[1]}. Allowed: the base model that it was made for."
        )
    found = {"centroids": h_ND.mean(0, keepdim=True)}
    if old.config.selection.threshold:
        center_1D = _router_tensor(old, "center").to(h_ND.device)
        found["threshold"] = torch.tensor([[_recipe_of(old).threshold(name, h_ND, center_1D)]])
    return found


def _recipe_of(old: StackedAdapter) -> Centroids:
    """The recipe that a mixture's router was made by; its defaults for what was made by another or noted none."""
    words = getattr(old.config.experts, "recipe", {})
    if words.get("kind") != Centroids.kind:
        return Centroids()
    recipe: Centroids = read("composition", {key: value for key, value in words.items() if key not in _NOT_OF_A_RECIPE})
    return recipe


def _router_tensor(old: StackedAdapter, name: str) -> Tensor:
    key = f"router.{name}"
    return next(site.tensors[key] for site in old.mixtures().values() if key in site.tensors)


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
    return _embed(base, batches, embedding, turn_start).mean(0, keepdim=True)


@torch.no_grad()
def _embed(base: nn.Module, batches: Iterable[Mapping[str, Any]], embedding: str, turn_start: Sequence[int]) -> Tensor:
    """The embedding [N, D] of each row's prompt, in fp32."""
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
    return torch.cat(found)


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return module(**inputs)
