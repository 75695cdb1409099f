"""Fitting the centroids of a training set, which MoR1E's router looks at.

Shape suffixes: N sequences, C centroids, H features of an embedding.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from moelora.errors import ConfigError
from moelora.layers.base import MoeLoraLayer
from moelora.routing.prompts import prompt_of
from moelora.routing.run import find_hooks


@torch.no_grad()
def fit_centroids(
    model: Any,
    examples: Sequence[Mapping[str, Sequence[int]]] | None = None,
    *,
    embeddings: Tensor | None = None,
    adapter_name: str = "default",
    seed: int = 0,
) -> Tensor:
    """Fit the centroids of an adapter with "intuition" scores by k-means, and write them into it.

    Args:
        model: A model with the adapter.
        examples: The training set as tokens: `input_ids`, and `labels` (-100 for the prompt) where there is an answer.
            The embedding is the one of the adapter's configuration.
        embeddings: In place of that the embeddings of the training set [N, H], as batches give them in
            `instance_embedding`.
        adapter_name: The adapter.
        seed: Seed of the first centroids.

    Returns:
        The centroids [C, H], of length 1.

    Raises:
        ConfigError: If the adapter has no such scores, there are fewer different embeddings than centroids, or they
            are of another size.
    """
    config = model.peft_config.get(adapter_name)
    scores = getattr(config, "scores", None)
    if config is None or scores is None or scores.kind != "intuition":
        found = "is not there" if config is None else f"has {scores.kind if scores else type(config).__name__!r} scores"
        raise ConfigError(f"adapter {adapter_name!r} {found}; allowed: one with 'intuition' scores (preset 'mor1e').")
    if (examples is None) == (embeddings is None):
        raise ConfigError("fit_centroids takes examples or embeddings; allowed: one of the two.")
    found_NH = embeddings if embeddings is not None else _embed(model, examples or (), scores.fact)
    layers = [m for m in model.modules() if isinstance(m, MoeLoraLayer) and m.has_adapter(adapter_name)]
    routers = [layer.routers[adapter_name] for layer in layers]
    centroids_CH = routers[0].tensor("centroids")
    if found_NH.dim() != 2 or found_NH.shape[1] != centroids_CH.shape[1]:
        raise ConfigError(
            f"the embeddings are {list(found_NH.shape)}; allowed: [sequences, {centroids_CH.shape[1]}]. Give the "
            "number of their features as embedding_features when the adapter is made."
        )
    centroids_CH.data.copy_(k_means(found_NH, len(centroids_CH), seed))
    config.scores = replace(scores, fitted=True)
    for router in routers:
        router.scores = config.scores
    return centroids_CH.detach().clone()


def fit_unfitted(model: Any, dataset: Any) -> None:
    """Fit the centroids of the active adapters that have none yet, to the rows that a trainer trains on.

    Args:
        model: The model; one without such an adapter is left alone.
        dataset: Tokenised rows: `input_ids`, and `completion_mask` or `labels` where prompt and answer are told apart.

    Raises:
        ConfigError: If the rows have no `input_ids`, as those of preferences.
    """
    active: Any = getattr(model, "active_adapters", [])
    for adapter in active() if callable(active) else active:
        scores = getattr(model.peft_config[adapter], "scores", None)
        if scores is not None and not getattr(scores, "fitted", True):
            if "input_ids" not in dataset[0]:
                raise ConfigError(
                    f"the centroids of adapter {adapter!r} are fitted to rows with input_ids, and these have "
                    f"{', '.join(dataset[0])}; allowed: rows of texts (recipe sft). Fit them with it first, or call "
                    "moelora.fit_centroids."
                )
            fit_centroids(model, [_example(row) for row in dataset], adapter_name=adapter)


def _example(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row with `labels` that tell its prompt."""
    ids, mask = row["input_ids"], row.get("completion_mask")
    labels = row.get("labels")
    if mask is not None:
        labels = [token if answered else -100 for token, answered in zip(ids, mask, strict=True)]
    return {"input_ids": ids} if labels is None else {"input_ids": ids, "labels": labels}


def _embed(model: Any, examples: Sequence[Mapping[str, Sequence[int]]], fact: str) -> Tensor:
    """The embedding of each example's prompt, [N, H]."""
    hooks, base = find_hooks(model), model.get_base_model()
    assert hooks is not None
    found = []
    for example in examples:
        inputs = {"input_ids": torch.tensor([prompt_of(example)], device=model.device)}
        found.append(hooks.facts_of_prompts(base, inputs)[fact].cpu())
    return torch.cat(found) if found else torch.zeros(0, 1)


def k_means(points_NH: Tensor, count: int, seed: int = 0, rounds: int = 100) -> Tensor:
    """Centroids [C, H] of length 1 of points that are compared by their cosines (spherical k-means, k-means++ start).

    Args:
        points_NH: The points.
        count: C.
        seed: Seed of the start.
        rounds: At most so many rounds.

    Raises:
        ConfigError: If fewer than C points differ in direction.
    """
    points_NH = F.normalize(points_NH.double().cpu(), dim=-1)
    different = len(torch.unique(points_NH.float(), dim=0))
    if different < count:
        raise ConfigError(
            f"there are {different} different embeddings for {count} centroids; allowed: at least as many. Give more "
            "rows, or lower num_centroids."
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = [int(torch.randint(len(points_NH), (1,), generator=generator))]
    while len(chosen) < count:
        distance_N = (1 - points_NH @ points_NH[chosen].t()).min(1).values.clamp_min(0)
        distance_N[chosen] = 0
        chosen.append(int(torch.multinomial(distance_N, 1, generator=generator)))
    centroids_CH, of_N = points_NH[chosen], None
    for _ in range(rounds):
        nearest_N = (points_NH @ centroids_CH.t()).argmax(1)
        if of_N is not None and torch.equal(nearest_N, of_N):
            break
        of_N = nearest_N
        sums_CH = torch.zeros_like(centroids_CH).index_add_(0, nearest_N, points_NH)
        empty_C = sums_CH.norm(dim=-1) < 1e-12
        centroids_CH = torch.where(empty_C.unsqueeze(-1), centroids_CH, F.normalize(sums_CH, dim=-1))
    return centroids_CH.float()
