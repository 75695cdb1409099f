"""Drop experts, and freeze some of them.

Shape suffixes: E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from moelora.compose.editing.edit import Edit, Size, finish, freeze_first, pick, trained_by_all
from moelora.compose.editing.stacked import StackedAdapter, check_output, read_stacked
from moelora.errors import ComposeError


def drop_experts(
    adapter: str | Path,
    output: str | Path,
    experts: Sequence[int | str] | None = None,
    *,
    usage: Mapping[str, Tensor] | None = None,
    below: float | None = None,
) -> Edit:
    """Write a mixture without some of its experts; those that stay share what the others got.

    Give the experts, or what `measure_routing` found and the share of the choices below which an expert is dropped.
    Where each site has a router of its own, expert number e of one site has nothing to do with that of another: by
    usage each site then drops its own least used ones, the same number everywhere, namely as many as every site has
    below the share. Frozen experts that stay are frozen in the result; where sites drop different ones, as many as
    every site has left.

    Args:
        adapter: Folder of the mixture.
        output: The folder to write.
        experts: Names or numbers of the experts to drop.
        usage: Share of the choices [E] that fell on each expert, by site.
        below: The share.

    Raises:
        ComposeError: If there is no such expert, none would stay or go, or the input or the output is not usable.
    """
    folder = check_output(output, adapter)
    old = read_stacked(adapter)
    E = old.num_experts
    old.mixtures()
    gone: Mapping[str, Sequence[int]]
    if experts is not None and usage is None:
        gone = dict.fromkeys(old.mixtures(), sorted({old.number(expert) for expert in experts}))
    elif usage is not None and below is not None and experts is None:
        gone = _unused(old, usage, below)
    else:
        raise ComposeError("drop takes experts, or usage with `below` (`--unused SHARE --data FILE --base MODEL`).")
    count = len(next(iter(gone.values())))
    if not 0 < count < E:
        what = (
            "none is named"
            if below is None
            else f"not every site has an expert with less than {below:g} of its choices"
        )
        raise ComposeError(
            f"{what if count == 0 else f'all {E} experts would be dropped'}; allowed: 1 to {E - 1} of {E} experts."
        )
    kept = {name: [e for e in range(E) if e not in ids] for name, ids in gone.items()}
    notes = []
    if not old.shares_experts and usage is not None:
        notes.append(f"each site dropped its {count} least used experts, which differ from site to site")
    if old.config.selection.picked([0] * (E - count), E) != old.config.selection:
        notes.append(f"fewer experts than choices are left, so that a token gets {E - count}")
    result = pick(old, kept)

    def still(frozen: int) -> int:
        return min(sum(e < frozen for e in ids) for ids in kept.values())

    config, more = freeze_first(result.config, still(old.config.experts.num_frozen))
    # a router may be trained over experts that are frozen: its rows are frozen only where they were
    config = replace(config, scores=result.config.scores.frozen(still(old.config.scores.num_frozen)))
    return finish(adapter, Size.of(old), replace(result, config=config), folder, *notes, *more)


def site_usage(adapter: StackedAdapter, usage: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The usage of each mixture's experts; of experts that are the same at all sites, that of all sites together.

    Raises:
        ComposeError: If a site is missing, or has another number of experts.
    """
    found = {}
    for name in adapter.mixtures():
        if name not in usage or len(usage[name]) != adapter.num_experts:
            raise ComposeError(
                f"the usage of {name!r} is {usage.get(name)}; allowed: {adapter.num_experts} shares for each mixture "
                "of the adapter, as `measure_routing` gives them for it."
            )
        found[name] = usage[name].float()
    if adapter.shares_experts:
        total = torch.stack(list(found.values())).mean(0)
        return dict.fromkeys(found, total)
    return found


def _unused(adapter: StackedAdapter, usage: Mapping[str, Tensor], below: float) -> dict[str, list[int]]:
    shares = site_usage(adapter, usage)
    count = min(int((share_E < below).sum()) for share_E in shares.values())
    return {name: share_E.argsort(stable=True)[:count].tolist() for name, share_E in shares.items()}


def freeze_experts(adapter: str | Path, output: str | Path, experts: Sequence[int | str]) -> Edit:
    """Write a mixture whose experts of these numbers, and no others, are kept from further training, as their rows are.

    They become the first ones, since what is frozen is stored as a tensor of its own; the function stays the same. The
    plain LoRAs beside the mixtures are frozen too.

    Args:
        adapter: Folder of the mixture.
        output: The folder to write.
        experts: Names or numbers of all that are to be frozen; an empty list frees all.

    Raises:
        ComposeError: If there is no such expert, or the input or the output is not usable.
    """
    folder = check_output(output, adapter)
    old = read_stacked(adapter)
    frozen = sorted({old.number(expert) for expert in experts})
    order = [*frozen, *(e for e in range(old.num_experts) if e not in frozen)]
    ordered = pick(old, order)
    config, notes = freeze_first(ordered.config, len(frozen))
    result = replace(ordered, config=config)
    moved = trained_by_all(result) if frozen else []
    if moved:
        notes.append(f"training still moves {', '.join(moved)}, which belong to all experts")
    freed = [e for e in range(old.config.experts.num_frozen) if e not in frozen]
    if freed:
        notes.append(f"{len(freed)} experts that were frozen are trained again: {freed}")
    if order != sorted(order):
        notes.append(f"the experts have a new order: {order}")
    return finish(adapter, Size.of(old), result, folder, *notes)
