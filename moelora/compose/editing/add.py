"""Add experts to a trained mixture, whose own are kept as they are.

Shape suffixes: E experts, N new ones, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moelora.choices import Param
from moelora.compose.editing.edit import Edit, Size, extend, finish, freeze_first, trained_by_all
from moelora.compose.editing.low_rank import cut, weighted_sum
from moelora.compose.editing.stacked import (
    StackedAdapter,
    StackedSite,
    check_output,
    picked,
    read_stacked,
)
from moelora.compose.pool import check_expert_names
from moelora.errors import ComposeError


def add_experts(
    adapter: str | Path,
    output: str | Path,
    *,
    count: int = 1,
    start: str | int = "zero",
    names: Sequence[str] | None = None,
    rows: Mapping[str, Tensor] | None = None,
    seed: int = 0,
) -> Edit:
    """Add experts to a trained mixture; the old ones, and their rows of the router, are frozen.

    What becomes of old inputs depends on the selection. With `nearest`, and with a renormalised `top_k` of a softmax,
    an input whose choice has no new expert in it gives the same bits as before, now and after training. With other
    weights (raw softmax, dense) a new row takes a share of every input's weight, so that outputs move by that share.

    A new expert starts as a fresh LoRA does, with B = 0. A new row of a linear router starts as the mean of the old
    rows; see `LinearScores.new_rows`. A mixture routed by centroids (the KV-anchor keys of LEMoE, arXiv 2406.20030, as
    one fixed key for each expert; its equations were not at hand) needs the new centroid in `rows`, the mean embedding
    of the new expert's prompts, and where it has thresholds the new one, without which the lowest of the old ones
    holds: `fit_router_rows` finds both.

    Args:
        adapter: Folder of the mixture.
        output: The folder to write.
        count: N, how many experts to add.
        start: "zero"; "mean", the mean of the old experts' products cut to their rank; or the name or number of an
            expert to copy.
        names: What the new ones are called, where the experts have names.
        rows: What the new experts have in the router's tensors, by name: [N, ...]. Needed where the choices do not
            know better: `{"centroids": ...}`, see `fit_router_rows`.
        seed: Seed of what starts at random.

    Raises:
        ComposeError: If the input is no mixture or is damaged, the output exists, a name is taken, rows are missing or
            do not fit, or training would move something that belongs to the old experts as well.
    """
    folder = check_output(output, adapter)
    old = read_stacked(adapter)
    mixtures, E = old.mixtures(), old.num_experts
    if count < 1:
        raise ComposeError(f"count is {count!r}; allowed: at least 1.")
    source = None if start in ("zero", "mean") else old.number(start)
    config, notes = freeze_first(picked(old.config, [*range(E), *[source or 0] * count]), E)
    if old.names:
        config = replace(config, experts=replace(config.experts, names=[*old.names, *_new_names(old, names, count)]))
        if source is None and config.experts.sources:
            sources = [*config.experts.sources[:E], *[{"source": f"added, start={start}"}] * count]
            config = replace(config, experts=replace(config.experts, sources=sources))
        if source is None and config.experts.ranks:
            ranks = [*config.experts.ranks[:E], *[config.experts.r] * count]
            config = replace(config, experts=replace(config.experts, ranks=ranks))
    elif names:
        raise ComposeError(f"names are {list(names)}; allowed: none, since this mixture's experts have only numbers.")
    sites = dict(old.sites)
    given, used = dict(rows or {}), set[str]()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for name, site in mixtures.items():
            new = _new_entries(old, site, count, start if source is None else source)
            new |= _router_rows(old, site, count, given, used)
            sites[name] = extend(site, new)
    if unused := sorted(set(given) - used):
        raise ComposeError(f"rows are given for {', '.join(unused)}, which the router does not have.")
    result = StackedAdapter(config, sites, old.rest)
    if moved := trained_by_all(result):
        raise ComposeError(
            f"training would move {', '.join(moved)}, which the old experts need as they are; allowed: a mixture all "
            "of whose trained tensors have an entry for each expert."
        )
    return finish(adapter, Size.of(old), result, folder, *notes)


def _new_names(old: StackedAdapter, names: Sequence[str] | None, count: int) -> list[str]:
    if names is None:
        free = (f"expert-{n}" for n in range(old.num_experts, old.num_experts + len(old.names) + count))
        names = [name for name in free if name not in old.names][:count]
    check_expert_names(names)
    clash = sorted(set(names) & set(old.names)) or (["two of the new ones"] if len(set(names)) < len(names) else [])
    if clash or len(names) != count or not all(names):
        raise ComposeError(
            f"names of the new experts are {list(names)}; allowed: {count} that differ from each other and from "
            f"{', '.join(old.names)}." + (f" Taken: {', '.join(clash)}." if clash else "")
        )
    return list(names)


def _new_entries(old: StackedAdapter, site: StackedSite, count: int, start: str | int) -> dict[str, Tensor]:
    """What the new experts have in the tensors of experts."""
    declared, per_expert = old.declared(site), old.per_expert(site)
    new: dict[str, Tensor] = {}
    for role in site.roles:
        a, b = f"A.{role}", f"B.{role}"
        a_ERD, b_EOR = site.factors(role)
        shared = a not in per_expert
        if isinstance(start, int):
            new_a, new_b = a_ERD[-1 if shared else start], b_EOR[start]
        elif start == "zero":
            new[b] = torch.zeros(count, *b_EOR.shape[1:])
            if not shared:
                new[a] = _fresh(declared[a], count)
            continue
        elif shared:
            new_a, new_b = a_ERD[0], b_EOR.mean(0)
        else:
            weights_E = torch.full((len(b_EOR),), 1 / len(b_EOR))
            mean = cut(*weighted_sum(a_ERD, b_EOR, weights_E), a_ERD.shape[1])
            new_a, new_b = mean.a_RD, mean.b_OR
        new[b] = new_b.expand(count, *new_b.shape)
        if not shared:
            new[a] = new_a.expand(count, *new_a.shape)
    return new


def _fresh(param: Param, count: int) -> Tensor:
    """New entries as training from nothing would start them."""
    tensor = torch.zeros(count, *param.shape[1:])
    param.init.fill(tensor)
    return tensor


def _router_rows(
    old: StackedAdapter, site: StackedSite, count: int, given: Mapping[str, Tensor], used: set[str]
) -> dict[str, Tensor]:
    """What the new experts have in the router's tensors."""
    found: dict[str, Tensor] = {}
    for name in sorted(old.per_expert(site)):
        tensor = name.removeprefix("router.")
        if tensor == name:
            continue
        before = site.tensors[name]
        shape = [count, *before.shape[1:]]
        rows: Tensor | None
        if tensor in given:
            rows = torch.as_tensor(given[tensor])
            used.add(tensor)
        else:
            choices = (old.config.scores, old.config.selection)
            known = (choice.new_rows(tensor, before.float(), count) for choice in choices)
            rows = next((each for each in known if each is not None), None)
        if rows is None or list(rows.shape) != shape:
            what = "not given" if rows is None else f"of shape {list(rows.shape)}"
            if tensor == "centroids":
                fix = "`--rows FILE`, or `fit_router_rows`, finds them on rows of the new expert."
            else:
                fix = (
                    "They are found from trained LoRAs or by training, not from rows: train the new expert as a LoRA, "
                    "and compose all of them again (`moelora compose`)."
                )
            raise ComposeError(
                f"the rows of {tensor!r} for the new experts are {what}, which {old.config.scores.kind!r} scores need "
                f"at {site.name!r}; allowed: a tensor {shape} in `rows`. {fix}"
            )
        found[name] = rows
    return found
