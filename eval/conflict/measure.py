"""What a model does on rows: the gradients of each task, and whether prompts tell the tasks apart.

Shape suffixes: N rows, D features of an embedding, E tasks.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.scoring.losses import BATCH, Example, losses_of_rows
from moelora.compose import fit_centroid
from moelora.compose.tokens import batches
from moelora.progress import track
from moelora.routing.prompts import prompt_of
from moelora.scores.centroids import cosines

# Of a task's rows, as many batches make its gradient: half of them each half.
GRADIENT_BATCHES = 4
# What lies outside of numbered layers.
OUTSIDE = "outside"


def gradients(model: nn.Module, given: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the mean row loss by what is trained, in fp32 on the CPU.

    Args:
        model: A model in eval mode, so that nothing is random.
        given: Batches as in `losses_of_rows`.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    total = {name: torch.zeros(parameter.shape) for name, parameter in trained.items()}
    rows = 0
    for batch in given:
        loss = losses_of_rows(model, batch).sum()
        for name, gradient in zip(trained, torch.autograd.grad(loss, list(trained.values())), strict=True):
            total[name] += gradient.detach().float().cpu()
        rows += len(batch["input_ids"])
    return {name: gradient / max(rows, 1) for name, gradient in total.items()}


def cosine(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Collection[str]) -> float:
    """Cosine of two gradients over some parameters; 0 where one of them vanishes."""
    x, y = (torch.cat([each[name].flatten().double() for name in names]) for each in (a, b))
    return float(F.cosine_similarity(x, y, dim=0))


def layer_of(name: str) -> str:
    """The number of the decoder layer that a parameter's name carries, or `OUTSIDE`."""
    found = re.search(r"\.(\d+)\.", name)
    return found.group(1) if found else OUTSIDE


def conflict(model: nn.Module, examples: Mapping[str, Sequence[Example]]) -> dict[str, Any]:
    """How much the tasks' gradients agree.

    Args:
        model: A model whose adapter is to be trained, in eval mode.
        examples: Tokenised training rows by task.

    Returns:
        `overall`, the cosine of each two tasks' gradients over all parameters, by task and task; on the diagonal that
        of two halves of the task's own rows, which is what noise leaves of 1. `layers`, the mean over pairs of
        different tasks, by decoder layer.
    """
    device = next(model.parameters()).device
    whole: dict[str, dict[str, Tensor]] = {}
    own: dict[str, float] = {}
    for task, rows in track(examples.items(), "gradients of tasks"):
        some = rows[: GRADIENT_BATCHES * BATCH]
        halves = [
            gradients(model, batches(part, BATCH, device)) for part in (some[: len(some) // 2], some[len(some) // 2 :])
        ]
        sizes = (len(some) // 2, len(some) - len(some) // 2)
        whole[task] = {
            name: (sizes[0] * halves[0][name] + sizes[1] * halves[1][name]) / len(some) for name in halves[0]
        }
        own[task] = cosine(halves[0], halves[1], halves[0])
    names = list(next(iter(whole.values())))
    layers: dict[str, list[str]] = {}
    for name in names:
        layers.setdefault(layer_of(name), []).append(name)
    pairs = list(itertools.combinations(whole, 2))
    overall = {a: {b: own[a] if a == b else cosine(whole[a], whole[b], names) for b in whole} for a in whole}
    return {
        "overall": overall,
        "layers": {
            layer: sum(cosine(whole[a], whole[b], part) for a, b in pairs) / len(pairs)
            for layer, part in layers.items()
        },
    }


@torch.no_grad()
def told_apart(
    base: nn.Module, fitted: Mapping[str, Sequence[Example]], asked: Mapping[str, Sequence[Example]]
) -> dict[str, float]:
    """The share of each task's prompts whose nearest centroid is the task's own.

    So `moelora compose --router '{kind: centroids, unknown: false}'` decides; without `unknown: false` it sends prompts
    that are far from every centroid to the base.

    Args:
        base: The base model without an adapter.
        fitted: Tokenised rows by task whose prompts make the centroids.
        asked: Tokenised rows by task whose prompts are asked for.
    """
    device = next(base.parameters()).device

    def prompts(examples: Sequence[Example], size: int) -> Iterable[dict[str, Tensor]]:
        return batches([{"input_ids": prompt_of(example)} for example in examples], size, device)

    centroids_ED = torch.cat([fit_centroid(base, prompts(examples, BATCH)) for examples in fitted.values()])
    center_1D = centroids_ED.mean(0, keepdim=True)
    shares = {}
    for task, examples in asked.items():
        singly = track(prompts(examples, 1), "embedding prompts", len(examples))
        h_ND = torch.cat([fit_centroid(base, [batch]) for batch in singly])
        nearest_N = cosines(h_ND, centroids_ED, center_1D).argmax(1)
        shares[task] = float((nearest_N == list(fitted).index(task)).float().mean())
    return shares
