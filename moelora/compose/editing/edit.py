"""What every edit does around its own work: read the input, write a new folder, tell the sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from moelora.compose.editing.stacked import (
    StackedAdapter,
    StackedSite,
    picked,
    write_stacked,
)
from moelora.compose.sources import stated_license
from moelora.config import MoeLoraConfig
from moelora.files import TOKENIZER_FILES


@dataclass(frozen=True)
class Size:
    """The size of an adapter's experts and routers.

    Attributes:
        num_experts: E of its mixtures; 1 without any.
        num_parameters: Stored numbers.
        num_trainable: How many of them training moves.
    """

    num_experts: int
    num_parameters: int
    num_trainable: int

    @classmethod
    def of(cls, adapter: StackedAdapter) -> Size:
        """The size of an adapter."""
        return cls(adapter.num_experts, adapter.num_parameters, adapter.num_trainable)


@dataclass(frozen=True)
class Edit:
    """An edit that was done.

    Attributes:
        folder: The new folder.
        before, after: The sizes.
        notes: What a user should know of it.
    """

    folder: Path
    before: Size
    after: Size
    notes: tuple[str, ...] = field(default=())


def finish(source: str | Path, before: Size, after: StackedAdapter, folder: Path, *notes: str) -> Edit:
    """Write the result, with the tokenizer that lies beside the adapter it was made of.

    Args:
        source: The folder of that adapter; what license its card states is a note.
        before: Its size.
        after: The result.
        folder: Where to write it.
        *notes: What a user should know of it.

    Raises:
        ComposeError: If it cannot be written.
    """
    write_stacked(after, folder, beside=[Path(source) / name for name in TOKENIZER_FILES])
    if stated := stated_license(str(source)):
        notes = (
            *notes,
            f"the card of {str(source)!r} states the license {stated!r}: `moelora push --license` takes it",
        )
    return Edit(folder, before, Size.of(after), notes)


def pick(adapter: StackedAdapter, experts: Sequence[int] | Mapping[str, Sequence[int]]) -> StackedAdapter:
    """The adapter with some of its experts, in a new order, none of them frozen.

    Args:
        adapter: The adapter.
        experts: Their numbers; where experts have no names and each site its router, perhaps others at each site.
    """
    of_site = experts if isinstance(experts, Mapping) else dict.fromkeys(adapter.mixtures(), experts)
    sites = dict(adapter.sites)
    for name, site in adapter.mixtures().items():
        ids = torch.tensor(list(of_site[name]))
        per_expert = adapter.per_expert(site)
        sites[name] = site.with_tensors({each: site.tensors[each].index_select(0, ids) for each in per_expert})
    # names differ between sites only where there are none, and a weight in the configuration belongs to all sites
    return replace(adapter, config=picked(adapter.config, next(iter(of_site.values()))), sites=sites)


def extend(site: StackedSite, rows: Mapping[str, Tensor]) -> StackedSite:
    """A site with more entries at the ends of some of its tensors."""
    grown = {name: torch.cat([site.tensors[name], rows[name].to(site.tensors[name])]) for name in rows}
    return site.with_tensors(grown)


def freeze_first(config: MoeLoraConfig, count: int) -> tuple[MoeLoraConfig, list[str]]:
    """Keep the first so many experts and their rows of the router from training.

    Returns:
        The configuration, and notes on what had to give way.
    """
    notes = []
    balance = config.balance
    if count and any(choice.moves_bias for choice in balance):
        balance = [choice for choice in balance if not choice.moves_bias]
        notes.append(
            "the routers' biases are not moved any more: a bias update would move those of frozen experts as well"
        )
    axes = {axis: getattr(config, axis).frozen(count) for axis in ("experts", "scores", "selection")}
    return replace(config, **axes, balance=balance), notes


def trained_by_all(adapter: StackedAdapter) -> list[str]:
    """The tensors that training moves although they belong to frozen experts too."""
    found = {
        name
        for site in adapter.mixtures().values()
        for name, param in adapter.declared(site).items()
        if param.trainable and param.num_frozen == 0
    }
    config = adapter.config
    saved = [f"modules_to_save={config.modules_to_save}"] if config.modules_to_save else []
    saved += [f"bias={config.bias!r}"] if config.bias != "none" else []
    saved += ["trainable_token_indices"] if config.trainable_token_indices else []
    return [*sorted(found), *saved]
