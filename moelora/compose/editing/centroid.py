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
from moelora.compose.routers.centroids import Centroids, check_apart
from moelora.errors import ComposeError
from moelora.fingerprint import check_base
from moelora.routing.batch import Batch
from moelora.routing.prompts import derive, prompt_mean

_NOT_OF_A_RECIPE = ("rows", "data")


def fit_router_rows(
    base: nn.Module, batches: Iterable[Mapping[str, Any]], adapter: str | Path, name: str = "new"
) -> dict[str, Tensor]:
    """What a new expert has in the tensors of a router by centroids: `rows` of `add_experts`.

    That is its centroid, see `fit_centroid`, and where the mixture has thresholds its own, by the rule of
    `moelora.compose.routers.Centroids` with the words that the mixture was composed with; where it noted none, with the
    rule's defaults. A warning says where the threshold refuses most of the prompts that it was found on.

    Args:
        base: The base model without an adapter.
        batches: Inputs of its forward, of prompts that the new expert is for.
        adapter: Folder of the mixture.
        name: What warnings and errors call the new expert.

    Returns:
        `centroids` [1, D], and `threshold` [1, 1] where the mixture has thresholds.

    Raises:
        ComposeError: If the mixture is not routed by centroids or does not fit the base, there is no prompt, one alone
            where the mixture has thresholds, or one expert has the same centroid.
        TargetError: If the mixture was made for another base model.
    """
    old = read_stacked(adapter)
    scores = old.config.scores
    if scores.kind != "centroids":
        raise ComposeError(
            f"{str(adapter)!r} has {scores.kind!r} scores, which are not found from rows of a new expert; allowed: a "
            "mixture routed by centroids. Leave such rows out for this one."
        )
    check_base(base, old.config.base_fingerprint, old.config.base_model_name_or_path)
    h_ND = _embed(base, batches, scores.embedding, scores.turn_start).cpu()
    if h_ND.shape[1] != scores.features:
        of = getattr(getattr(base, "config", None), "_name_or_path", "") or type(base).__name__
        raise ComposeError(
            f"{str(adapter)!r} does not fit the base model {of!r}: its centroids have {scores.features} features, and "
            f"the base's embeddings {h_ND.shape[1]}. Allowed: the base model that it was made for."
        )
    router = _router_of(old)
    centroid_1D = h_ND.mean(0, keepdim=True)
    names = old.names or [str(number) for number in range(old.num_experts)]
    check_apart([*names, name], torch.cat([router["centroids"], centroid_1D]))
    found = {"centroids": centroid_1D}
    if "threshold" in router:
        found["threshold"] = torch.tensor([[_recipe_of(old).threshold(name, h_ND, router["center"])]])
    return found


def _recipe_of(old: StackedAdapter) -> Centroids:
    """The recipe that a mixture's router was made by; its defaults for what was made by another or noted none."""
    words = getattr(old.config.experts, "recipe", {})
    if words.get("kind") != Centroids.kind:
        return Centroids()
    recipe: Centroids = read("composition", {key: value for key, value in words.items() if key not in _NOT_OF_A_RECIPE})
    return recipe


def _router_of(old: StackedAdapter) -> dict[str, Tensor]:
    """The tensors of a mixture's router by their names; all sites of a mixture by centroids have the same."""
    site = next(site for site in old.mixtures().values() if site.owns_router)
    return {key.removeprefix("router."): tensor for key, tensor in site.tensors.items() if key.startswith("router.")}


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
        ComposeError: If there is no row, or an embedding is not finite.
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
    h_ND = torch.cat(found)
    if not bool(h_ND.isfinite().all()):
        raise ComposeError(
            f"the base model's embeddings of the prompts hold NaN or infinity in {base.dtype}; allowed: finite ones. "
            "Load the base in bfloat16 or float32."
        )
    return h_ND


def _call(module: nn.Module, inputs: Mapping[str, Any]) -> Any:
    return module(**inputs)
