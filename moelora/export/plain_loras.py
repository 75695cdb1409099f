"""A mixture that picks one expert for a whole request, as ordinary LoRAs and a small router beside them.

Shape suffixes: N requests, E experts, D features.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from torch import Tensor

from moelora.config import MoeLoraConfig
from moelora.errors import ExportError
from moelora.export.adapter import LORA_EXPERTS, OpenAdapter, open_adapter
from moelora.export.mixing import DISTIL, check_block, fixed_gates, gates_of_zeros, ignores_input, is_one, mixed_loras
from moelora.export.output import Lora, output_folder, save_tensors, write_lora
from moelora.export.record import export_record, write_record
from moelora.routing.batch import Tokens
from moelora.validation import unusable_name
from moelora.version import __version__

ROUTER_FORMAT = 1
_EXAMPLES = {kind: Path(__file__).with_name(f"route_by_{kind}.py") for kind in ("task", "centroid")}
_NO_EXPERT = "no-expert"


def export_loras(
    adapter: str | Path | PeftModel, output: str | Path, *, base: str | None = None, adapter_name: str = "default"
) -> Path:
    """Write a mixture as ordinary PEFT LoRAs, which give its very outputs.

    - A fixed mix (`constant` scores), or an adapter without routers, is one LoRA: `output` is its folder. Ranks add up.
    - One choice for each sequence is a folder for each choice, with router.json, router.safetensors (unless the choice
      is the task's number) and route.py, an example that picks the LoRA of a request and needs no moelora. Plain LoRAs
      beside the mixtures are in every one. What a folder's name cannot be is replaced by "-"; "renamed" in router.json
      has the experts' own names then.

    Args:
        adapter: A model with the adapter, the folder of a saved one, or its name on the Hub.
        output: The folder to write; it must not exist.
        base: See `open_adapter`.
        adapter_name: Of a model, the name of the adapter.

    Returns:
        `output`.

    Raises:
        ExportError: If the mixture is routed token by token, sums whole feed-forward blocks, or cannot be read or
            written. Nothing is left at `output` then.
        MoeLoraError: If the adapter does not fit the base model.
    """
    opened = open_adapter(adapter, base=base, adapter_name=adapter_name, kinds=(*LORA_EXPERTS, "poly"))
    gates = fixed_gates(opened)
    if gates is not None:
        for site in opened.routed:
            check_block(site, gates[site.name])
        with output_folder(output) as folder:
            write_lora(folder, mixed_loras(opened, gates), opened)
            write_record(folder, export_record("lora", opened.config, opened.base_name, exact=True))
        return Path(output)
    by_task = check_by_sequence(opened.config) == "task"
    loras, router, tensors = _by_task(opened) if by_task else _by_centroid(opened)
    with output_folder(output) as folder:
        for name, parts in loras.items():
            write_lora(folder / name, parts, opened)
        words = {
            "router_format": ROUTER_FORMAT,
            "written_by": f"moelora {__version__}",
            "base_model": opened.base_name,
            **router,
            **({"renamed": renamed} if (renamed := _renamed(opened)) else {}),
        }
        (folder / "router.json").write_text(json.dumps(words, indent=2) + "\n")
        if tensors:
            save_tensors(tensors, folder / "router.safetensors")
        shutil.copyfile(_EXAMPLES[router["kind"]], folder / "route.py")
        write_record(folder, export_record("loras", opened.config, opened.base_name))
    return Path(output)


def check_by_sequence(config: MoeLoraConfig) -> Literal["task", "centroid"]:
    """What a mixture chooses one expert for a sequence by.

    Raises:
        ExportError: If it does not.
    """
    if config.needs == {"task_ids"} and ignores_input(config):
        return "task"
    if config.scores.kind == "centroids" and config.selection.kind == "nearest":
        return "centroid"
    if config.scores.kind == "centroids":
        raise ExportError(
            f"the selection is {config.selection.describe()}, which mixes experts; allowed: 'nearest', one expert for "
            f"each sequence. {DISTIL}."
        )
    raise ExportError(
        f"the mixture is routed token by token (scores {config.scores.describe()}, selection "
        f"{config.selection.describe()}), so no LoRA is right for a whole request; allowed: 'task' or 'centroids' "
        f"scores with one choice for each sequence, or 'constant'. {DISTIL}, or keep its routing with "
        "`--to native-moe`.",
        anchor="not-by-sequence",
    )


def _by_task(adapter: OpenAdapter) -> tuple[dict[str, dict[str, Lora]], dict[str, Any], dict[str, Tensor]]:
    """A LoRA for each task's number: an expert, or what a table of tasks mixes; -1 is the base model.

    Scores without a table (`num_tasks`) take the numbers of the experts and -1.
    """
    num_tasks = getattr(adapter.config.scores, "num_tasks", None)
    ids_N = torch.arange(-1, adapter.config.experts.num_experts) if num_tasks is None else torch.arange(num_tasks)
    tokens = Tokens(torch.ones(len(ids_N), 1) > 0, facts={"task_ids": ids_N})
    gates = {site.name: gates_of_zeros(site, tokens) for site in adapter.routed}
    names, low_rank = expert_names(adapter), adapter.config.experts.is_low_rank
    loras: dict[str, dict[str, Lora]] = {}
    table: dict[str, str | None] = {}
    for index, task in enumerate(ids_N.tolist()):
        of_task = {name: gates_NE[index] for name, gates_NE in gates.items()}
        chosen = {tuple(gates_E.tolist()) for gates_E in of_task.values()}
        nothing = not any(map(any, chosen))
        if nothing and any(site.is_block for site in adapter.routed):
            continue  # a block is inside its experts, so that it would be left out with them
        for site in adapter.routed:
            check_block(site, of_task[site.name])
        name: str | None = f"task-{task}"
        if nothing:
            name = _NO_EXPERT
        elif low_rank and len(chosen) == 1 and is_one(only := torch.tensor(next(iter(chosen)))):
            name = names[int(only.argmax())]
        mixed = mixed_loras(adapter, of_task)
        if mixed and name is not None:
            loras[name] = mixed
        table[str(task)] = name if mixed else None
    return loras, {"kind": "task", "loras": table}, {}


def _by_centroid(adapter: OpenAdapter) -> tuple[dict[str, dict[str, Lora]], dict[str, Any], dict[str, Tensor]]:
    """A LoRA for each expert, and the router's tensors."""
    config = adapter.config
    tensors = _shared_tensors(adapter)
    names = expert_names(adapter)
    experts = torch.eye(len(names))
    loras = {
        name: mixed_loras(adapter, {site.name: experts[expert] for site in adapter.routed})
        for expert, name in enumerate(names)
    }
    otherwise = None
    if config.selection.threshold:
        plain = mixed_loras(adapter, {site.name: torch.zeros(len(names)) for site in adapter.routed})
        if plain:
            loras[otherwise := _NO_EXPERT] = plain
    scores = {"embedding": config.scores.embedding, "turn_start": config.scores.turn_start}
    router = {"kind": "centroid", **scores, "loras": names, "otherwise": otherwise}
    return loras, router, tensors


def _shared_tensors(adapter: OpenAdapter) -> dict[str, Tensor]:
    """The tensors of the one router, or of routers that are all equal."""
    first, *rest = adapter.routed
    assert first.router is not None
    tensors = {name: first.router.tensor(name).detach().float().cpu() for name in first.router.pieces}
    for site in rest:
        assert site.router is not None
        if any(not torch.equal(site.router.tensor(name).float().cpu(), tensor) for name, tensor in tensors.items()):
            raise ExportError(
                f"the routers of {first.name!r} and {site.name!r} differ, so that they may choose different experts "
                f"for one sequence; allowed: one router for all sites (placement.routers='per_model'). {DISTIL}."
            )
    return tensors


def _given_names(adapter: OpenAdapter) -> list[str]:
    E = adapter.config.experts.num_experts
    return getattr(adapter.config.experts, "names", []) or [f"expert-{expert}" for expert in range(E)]


def _renamed(adapter: OpenAdapter) -> dict[str, str]:
    """The experts whose folder has another name than they, by the folder."""
    pairs = zip(expert_names(adapter), _given_names(adapter), strict=True)
    return {folder: name for folder, name in pairs if folder != name}


def expert_names(adapter: OpenAdapter) -> list[str]:
    """A name for each expert that a folder can have, and a path in a URL or a command without quoting.

    Raises:
        ExportError: If two names are the same folder, or one is too long.
    """
    given = _given_names(adapter)
    names = [re.sub(r"[^\w.-]+", "-", name).strip(".-") or "expert" for name in given]
    folders = [name.casefold() for name in names]  # some file systems do not tell capitals
    taken = {"router.json", "router.safetensors", "route.py", _NO_EXPERT}
    for name, original in zip(names, given, strict=True):
        if unusable_name(name) is not None:
            raise ExportError(
                f"expert {original[:60]!r}... {unusable_name(name)}; allowed: a name that a folder can have. Rename "
                "the expert in the adapter's configuration, experts.names."
            )
        if folders.count(name.casefold()) > 1 or name.casefold() in taken:
            raise ExportError(
                f"expert {original!r} would be the folder {name!r}, which is taken; allowed: names that differ in "
                f"letters, digits, '_', '.' and '-' (they are {', '.join(map(repr, given))}). Rename the expert in the "
                "adapter's configuration, experts.names."
            )
    return names
