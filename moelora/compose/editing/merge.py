"""Merge experts that are alike, and cut experts to a lower rank.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moelora.compose.editing.edit import Edit, Size, finish
from moelora.compose.editing.low_rank import cut, weighted_sum
from moelora.compose.editing.measure import SiteRouting
from moelora.compose.editing.remove import site_usage
from moelora.compose.editing.stacked import StackedAdapter, StackedSite, check_output, read_stacked
from moelora.errors import ComposeError


def merge_experts(
    adapter: str | Path, output: str | Path, *, num_experts: int, routing: Mapping[str, SiteRouting]
) -> Edit:
    """Merge the experts that the router treats alike (MC-SMoE, arXiv 2310.01334).

    The most used experts of a site are its dominant ones; every other expert joins the dominant one whose router logits
    are the most similar to its own (cosine over the tokens of the data), and a group becomes the mean of its experts,
    weighted by how often each was chosen.

    Deviations: the products `B A` are averaged and cut to the rank by SVD, which needs no alignment of neurons (the
    paper permutes those of whole feed-forward experts first); each site keeps the same number of experts, since a
    mixture has one E (the paper lets layers differ); the merged expert's row of the router is the mean of its members'
    rows, weighted alike (the paper keeps all rows and sends them to the merged expert). Where all sites share the
    experts, by a common router or by names, the groups are the same everywhere.

    Args:
        adapter: Folder of the mixture.
        output: The folder to write.
        num_experts: How many experts to keep.
        routing: What `measure_routing` found, by site.

    Raises:
        ComposeError: If the number is not below that of the experts, or the input or the output is not usable.
    """
    folder = check_output(output, adapter)
    old = read_stacked(adapter)
    E, mixtures = old.num_experts, old.mixtures()
    if not 1 <= num_experts < E:
        raise ComposeError(f"num_experts is {num_experts!r}; allowed: 1 to {E - 1}, fewer than the {E} there are.")
    usage = site_usage(old, {name: found.usage_E for name, found in routing.items()})
    groups = {name: _groups(usage[name], routing[name].similarity_EE, num_experts) for name in mixtures}
    if old.shares_experts:
        mean_EE = torch.stack([routing[name].similarity_EE for name in mixtures]).mean(0)
        groups = dict.fromkeys(mixtures, _groups(next(iter(usage.values())), mean_EE, num_experts))
    sites, kept = dict(old.sites), list[float]()
    for name, site in mixtures.items():
        sites[name] = site.with_tensors(_merged(old, site, groups[name], usage[name], kept))
    config = old.config
    axes = {a: getattr(config, a).merged(next(iter(groups.values())), E) for a in ("experts", "scores", "selection")}
    result = StackedAdapter(replace(config, **axes), sites, old.rest)
    freed = ["no expert is frozen any more"] if old.config.experts.num_frozen else []
    return finish(adapter, Size.of(old), result, folder, _kept(kept), *freed)


def _groups(usage_E: Tensor, similarity_EE: Tensor, count: int) -> list[list[int]]:
    """Experts in groups, each led by a dominant one, in the order of those."""
    dominant = sorted(usage_E.argsort(descending=True, stable=True)[:count].tolist())
    groups = {e: [e] for e in dominant}
    for e in range(len(usage_E)):
        if e not in groups:
            groups[dominant[int(similarity_EE[e, dominant].argmax())]].append(e)
    return list(groups.values())


def _merged(
    adapter: StackedAdapter, site: StackedSite, groups: Sequence[Sequence[int]], usage_E: Tensor, kept: list[float]
) -> dict[str, Tensor]:
    """The tensors of a site that change; the share that each cut keeps is added to `kept`."""
    per_expert = adapter.per_expert(site)
    weights = [_shares(usage_E[list(group)]) for group in groups]

    def means(tensor: Tensor) -> Tensor:
        pairs = zip(groups, weights, strict=True)
        return torch.stack([torch.tensordot(w.to(tensor), tensor[list(g)], 1) for g, w in pairs])

    new = {name: means(site.tensors[name].float()) for name in per_expert if name.startswith("router.")}
    for role in site.roles:
        a, b = f"A.{role}", f"B.{role}"
        a_ERD, b_EOR = site.factors(role)
        if a not in per_expert:
            new[b] = means(b_EOR)
            continue
        new[a], new[b] = a_ERD[[g[0] for g in groups]], b_EOR[[g[0] for g in groups]]
        for index, (group, shares) in enumerate(zip(groups, weights, strict=True)):
            if len(group) > 1:
                found = cut(*weighted_sum(a_ERD[list(group)], b_EOR[list(group)], shares), a_ERD.shape[1])
                new[a][index], new[b][index] = found.a_RD, found.b_OR
                kept.append(found.kept)
    return new


def _shares(usage: Tensor) -> Tensor:
    """Weights that sum to one; equal ones for a group that nobody chose."""
    total = usage.sum()
    return usage / total if total > 0 else torch.full_like(usage, 1 / len(usage))


def cut_ranks(adapter: str | Path, output: str | Path, *, rank: int) -> Edit:
    """Cut every expert, and every plain LoRA beside the mixtures, to a lower rank by SVD of its product.

    Of experts that share one A, the stack of all their products is cut, so that they share one A again.

    Args:
        adapter: Folder of the mixture.
        output: The folder to write.
        rank: The new rank of one expert.

    Raises:
        ComposeError: If the rank is not below the old one, or the input or the output is not usable.
    """
    folder = check_output(output, adapter)
    old = read_stacked(adapter)
    experts = old.config.experts
    if not 1 <= rank < experts.r:
        raise ComposeError(f"rank is {rank!r}; allowed: 1 to {experts.r - 1}, below the rank {experts.r} there is.")
    sites, kept = dict(old.sites), list[float]()
    for name, site in old.sites.items():
        new: dict[str, Tensor] = {}
        for role in site.roles:
            a_ERD, b_EOR = site.factors(role)
            if len(a_ERD) < len(b_EOR):
                found = cut(a_ERD[0], b_EOR.flatten(0, 1), rank)
                new[f"A.{role}"] = found.a_RD.unsqueeze(0)
                new[f"B.{role}"] = found.b_OR.unflatten(0, b_EOR.shape[:2])
                kept.append(found.kept)
                continue
            cuts = [cut(a_RD, b_OR, rank) for a_RD, b_OR in zip(a_ERD, b_EOR, strict=True)]
            new[f"A.{role}"] = torch.stack([each.a_RD for each in cuts])
            new[f"B.{role}"] = torch.stack([each.b_OR for each in cuts])
            kept += [each.kept for each in cuts]
        sites[name] = site.with_tensors(new)
    # the scaling of an expert stays what it was
    alpha = experts.scaling * (rank**0.5 if experts.use_rslora else rank)
    changes = {"ranks": [min(rank, each) for each in experts.ranks]} if getattr(experts, "ranks", None) else {}
    config = replace(old.config, experts=replace(experts, r=rank, lora_alpha=alpha, **changes))
    return finish(adapter, Size.of(old), StackedAdapter(config, sites, old.rest), folder, _kept(kept))


def _kept(shares: Sequence[float]) -> str:
    if not shares:
        return "nothing was cut"
    mean = sum(shares) / len(shares)
    return f"the cuts keep {mean:.2%} of the products' squared norm on average, {min(shares):.2%} at the least"
