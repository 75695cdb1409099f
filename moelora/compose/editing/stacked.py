"""An adapter's folder as stacked tensors by site: what the edits of experts read, change and write.

No base model is needed: a site's shapes are those of its tensors, and its names those that the choices declare.

Shape suffixes: E experts, R rank of one expert, D input features, O output features.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from moelora.choices import Param, Site
from moelora.config import MoeLoraConfig
from moelora.errors import ComposeError
from moelora.files import written_folder
from moelora.formats import check_finite, upgrade_keys
from moelora.peft_type import PEFT_TYPE, PREFIX
from moelora.version import __version__

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PATH = "base_model.model."
_ROUTER = "router"


@dataclass(frozen=True, eq=False)
class StackedSite:
    """One adapted module.

    Attributes:
        name: Its name in the base model.
        routed: Whether it is a mixture; else one ordinary LoRA.
        tensors: Its tensors by the names that the choices declare ("A.weight", "B.up", "router.weight"), each whole:
            what is frozen of it and the rest in one.
    """

    name: str
    routed: bool
    tensors: Mapping[str, Tensor]

    @property
    def owns_router(self) -> bool:
        """Whether it holds tensors of a router."""
        return any(name.startswith(f"{_ROUTER}.") for name in self.tensors)

    @property
    def roles(self) -> list[str]:
        """Its linears, as the names of tensors end: "weight" of a single one, or "up", "down", "gate"."""
        return [name.partition(".")[2] for name in self.tensors if name.startswith("A.")]

    def factors(self, role: str) -> tuple[Tensor, Tensor]:
        """A [E, R, D] and B [E, O, R] of a linear, in fp32; A is [1, R, D] where the experts share it."""
        return self.tensors[f"A.{role}"].float(), self.tensors[f"B.{role}"].float()

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> StackedSite:
        """The same site with some tensors replaced; each keeps its data type."""
        cast = {name: tensor.to(self.tensors[name].dtype) for name, tensor in tensors.items()}
        return replace(self, tensors={**self.tensors, **cast})


@dataclass(frozen=True, eq=False)
class StackedAdapter:
    """An adapter without its base model.

    Attributes:
        config: Its configuration.
        sites: Its adapted modules by name.
        rest: All other tensors of the file: biases, modules that are saved whole.
    """

    config: MoeLoraConfig
    sites: Mapping[str, StackedSite]
    rest: Mapping[str, Tensor]

    @property
    def num_experts(self) -> int:
        """E of its mixtures."""
        return int(self.config.experts.num_experts)

    def mixtures(self) -> dict[str, StackedSite]:
        """The sites with a mixture.

        Raises:
            ComposeError: If there are none.
        """
        found = {name: site for name, site in self.sites.items() if site.routed}
        if not found:
            raise ComposeError(
                "the adapter has no mixture, only plain LoRA; allowed: an adapter with experts. Split it first "
                "(`moelora expert split`)."
            )
        return found

    @property
    def shares_experts(self) -> bool:
        """Whether expert number e is one and the same at all sites: it has a name, or sites have no own routers."""
        owners = sum(site.owns_router for site in self.mixtures().values())
        return bool(self.names) or owners == 0 or self.config.placement.routers != "per_site"

    @property
    def names(self) -> list[str]:
        """What the experts are called; empty if they have numbers only."""
        return list(getattr(self.config.experts, "names", []))

    def number(self, expert: int | str) -> int:
        """The number of an expert.

        Args:
            expert: A name, or a number, also as text.

        Raises:
            ComposeError: If there is no such expert.
        """
        if expert in self.names:
            return self.names.index(str(expert))
        digits = str(expert)
        if not isinstance(expert, bool) and digits.isdecimal() and int(digits) < self.num_experts:
            return int(digits)
        named = f", or one of {', '.join(self.names)}" if self.names else ""
        raise ComposeError(f"there is no expert {expert!r}; allowed: 0 to {self.num_experts - 1}{named}.")

    def declared(self, site: StackedSite) -> dict[str, Param]:
        """What the configuration declares at a site, with the shapes that its tensors have."""
        return {
            name: replace(param, shape=tuple(site.tensors[name].shape)) if name in site.tensors else param
            for name, param in _declared(self.config, site).items()
        }

    def per_expert(self, site: StackedSite) -> set[str]:
        """The tensors of a site that have an entry for each expert: those that grow with the number of experts."""
        grown = _declared(picked(self.config, [*range(self.num_experts), 0]), site)
        return {name for name, param in _declared(self.config, site).items() if grown[name].shape != param.shape}

    def stored(self) -> Iterator[tuple[str, Param, Tensor]]:
        """Key in the file, declaration and value of each tensor of experts and routers."""
        for site in self.sites.values():
            for name, param in self.declared(site).items():
                tensor, start = site.tensors[name], 0
                for piece in param.stored():
                    yield f"{_PATH}{site.name}.{PREFIX}{piece.name}", piece, tensor[start : start + piece.shape[0]]
                    start += piece.shape[0]

    @property
    def num_parameters(self) -> int:
        """Stored numbers of experts and routers."""
        return sum(tensor.numel() for _, _, tensor in self.stored())

    @property
    def num_trainable(self) -> int:
        """How many of them training moves."""
        return sum(tensor.numel() for _, param, tensor in self.stored() if param.trainable)


def picked(config: MoeLoraConfig, experts: Sequence[int]) -> MoeLoraConfig:
    """The configuration of a mixture of some of the experts; see `Choice.picked`."""
    E = config.experts.num_experts
    axes = {axis: getattr(config, axis).picked(experts, E) for axis in ("experts", "scores", "selection")}
    return replace(config, **axes)


def _declared(config: MoeLoraConfig, site: StackedSite) -> dict[str, Param]:
    roles = {name.partition(".")[2] for name in site.tensors if name[:2] in ("A.", "B.")}
    declared = Site(
        name=site.name,
        linears={"" if role == "weight" else role: (1, 1) for role in sorted(roles)},
        num_experts=config.experts.num_experts if site.routed else 1,
        routed=site.routed,
        router_features=1,
        owns_router=site.owns_router,
    )
    routers = [replace(param, name=f"{_ROUTER}.{param.name}") for param in config.router_params(declared)]
    return {param.name: param for param in [*config.expert_params(declared), *routers]}


def read_stacked(folder: str | Path) -> StackedAdapter:
    """Read an adapter's folder.

    Raises:
        ComposeError: If there is none, it is not one of moelora's, or its two files are damaged, do not fit, or hold
            NaN.
        FormatVersionError: If it was written in a newer format than this version reads.
    """
    folder = Path(folder)
    missing = [name for name in (CONFIG_FILE, WEIGHTS_FILE) if not (folder / name).is_file()]
    if missing:
        raise ComposeError(
            f"{str(folder)!r} holds no adapter: {' and '.join(missing)} missing. Give a folder that "
            "`model.save_pretrained` wrote."
        )
    words = read_words(folder)
    if words.get("peft_type") != PEFT_TYPE.value:
        raise ComposeError(
            f"{str(folder)!r} is an adapter of PEFT type {words.get('peft_type')!r}; allowed: {PEFT_TYPE.value!r}. "
            "Only `moelora expert split` takes a LoRA."
        )
    config: MoeLoraConfig = MoeLoraConfig.from_pretrained(str(folder))
    if not (config.experts.has_stacks and config.experts.is_low_rank):
        raise ComposeError(
            f"{str(folder)!r} has {config.experts.kind!r} experts; allowed: experts that are LoRAs. Others cannot be "
            "edited one by one."
        )
    if not config.experts.are_alike:
        raise ComposeError(
            f"{str(folder)!r} has {config.experts.kind!r} experts, some of which are null or always on; allowed: "
            "experts that are all alike. Their numbers would change when others are edited."
        )
    if config.experts.fewest < config.experts.num_experts:
        raise ComposeError(
            f"{str(folder)!r} has from {config.experts.fewest} to {config.experts.num_experts} experts, by layer; "
            "allowed: the same number everywhere. Experts are edited by their number in every layer at once."
        )
    try:
        weights = upgrade_keys(load_file(folder / WEIGHTS_FILE))
    except (SafetensorError, OSError) as error:
        raise ComposeError(
            f"{str(folder / WEIGHTS_FILE)!r} cannot be read ({error}); it may be cut off. Save or download it again."
        ) from error
    check_finite(weights, repr(str(folder)), ComposeError)
    return _of_file(config, weights, str(folder))


def read_words(folder: Path) -> dict[str, Any]:
    """The content of a folder's adapter_config.json.

    Raises:
        ComposeError: If it is no JSON of a mapping.
    """
    try:
        words = json.loads((folder / CONFIG_FILE).read_text())
    except (ValueError, OSError) as error:
        raise ComposeError(f"{str(folder / CONFIG_FILE)!r} cannot be read ({error}). Save it again.") from error
    if not isinstance(words, dict):
        raise ComposeError(f"{str(folder / CONFIG_FILE)!r} holds {type(words).__name__}; allowed: a mapping.")
    return words


def _of_file(config: MoeLoraConfig, weights: Mapping[str, Tensor], where: str) -> StackedAdapter:
    pieces: dict[str, dict[str, Tensor]] = {}
    rest: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        module, marker, name = key.rpartition(f".{PREFIX}")
        if marker:
            pieces.setdefault(module.removeprefix(_PATH), {})[name] = tensor
        else:
            rest[key] = tensor
    sites: dict[str, StackedSite] = {}
    for module, found in pieces.items():
        whole = {name.removesuffix("_frozen") for name in found}
        is_block = not any(name == "A.weight" for name in whole)
        site = StackedSite(module, is_block or config.placement.routes_linear(module), dict.fromkeys(whole, _NOTHING))
        tensors = {}
        for name, param in _declared(config, site).items():
            parts = [found.pop(piece.name, None) for piece in param.stored()]
            tensors[name] = torch.cat([part for part in parts if part is not None] or [_NOTHING])
            if any(part is None for part in parts) or tensors[name].shape[0] != param.shape[0]:
                have = [None if part is None else list(part.shape) for part in parts]
                raise ComposeError(
                    f"{where!r} has {have} for {name} of {module!r}, and its configuration declares "
                    f"{[piece.shape[0] for piece in param.stored()]} entries; the two files do not belong together."
                )
        if found:
            raise ComposeError(
                f"{where!r} has {', '.join(sorted(found))} at {module!r}, which its configuration does not declare; "
                "the two files do not belong together."
            )
        sites[module] = replace(site, tensors=tensors)
    if not sites:
        raise ComposeError(f"{where!r} holds no tensors of experts. The two files do not belong together.")
    return StackedAdapter(config, sites, rest)


_NOTHING = torch.zeros(0)


def check_output(output: str | Path, *inputs: str | Path) -> Path:
    """The folder to write to.

    Raises:
        ComposeError: If it is there already, or is one that is read.
    """
    folder = Path(output)
    if any(folder.resolve() == Path(given).resolve() for given in inputs):
        raise ComposeError(f"the output {str(folder)!r} is the input; allowed: a new folder. Nothing is overwritten.")
    if folder.exists() or folder.is_symlink():
        raise ComposeError(
            f"the output {str(folder)!r} exists; allowed: a new folder. Nothing is overwritten: delete it first, if it "
            "is left from something that was stopped."
        )
    return folder


def write_stacked(adapter: StackedAdapter, folder: Path, beside: Iterable[Path] = ()) -> None:
    """Write an adapter to a new folder, which is there whole or not at all.

    Args:
        adapter: The adapter.
        folder: The folder.
        beside: Files to copy into it, those of them that are there.

    Raises:
        ComposeError: If it cannot be written.
    """
    weights = {key: tensor.contiguous().clone() for key, _, tensor in adapter.stored()}
    with written_folder(folder, ComposeError) as ready:
        replace(adapter.config, moelora_version=__version__).save_pretrained(str(ready))
        save_file({**weights, **adapter.rest}, ready / WEIGHTS_FILE, metadata={"format": "pt"})
        for file in beside:
            if file.is_file():
                shutil.copyfile(file, ready / file.name)
