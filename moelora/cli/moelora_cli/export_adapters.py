"""`moelora export --to lora`, `--to mixlora` and `--to moelora`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moelora.errors import ExportError

_BATCH = 8


def export_lora(options: argparse.Namespace) -> None:
    """Write a mixture as ordinary LoRAs, or as one, and print what was written."""
    from moelora.export import distill_lora, export_loras

    if options.rank is None:
        _only_with_rank(options)
        _print(_summary(export_loras(options.adapter, options.output, base=_base(options))))
    elif options.data is None:
        found = distill_lora(
            options.adapter, options.output, rank=options.rank, steps=options.steps, base=_base(options)
        )
        _print(_summary(found.output), found.table())
    else:
        found = _distill_on_data(options)
        _print(_summary(found.output), found.table())


def export_mixlora(options: argparse.Namespace) -> None:
    """Write a folder of MixLoRA's authors and print where it is."""
    from moelora.export import write_mixlora

    _only_with_rank(options, "--to lora")
    folder = write_mixlora(options.adapter, options.output, base=_base(options))
    words = json.loads((folder / "adapter_config.json").read_text())
    rows = [
        ("experts", f"{words['num_experts']} of rank {words['r']}, {words['top_k']} per token"),
        ("base model", words["base_model_name_or_path"]),
        ("files", ", ".join(sorted(path.name for path in folder.iterdir()))),
        ("next", f"moelora export {folder} NEW --to moelora    (reads it back)"),
    ]
    _print((folder, rows))


def import_mixlora(options: argparse.Namespace) -> None:
    """Write a folder of MixLoRA's authors as an adapter of moelora and print where it is."""
    from moelora.config import MoeLoraConfig
    from moelora.export import read_mixlora

    _only_with_rank(options, "--to lora")
    folder = read_mixlora(options.adapter, options.output, base=_base(options))
    config = MoeLoraConfig.from_pretrained(str(folder))
    rows = [
        ("experts", f"{config.experts.num_experts} of rank {config.experts.r}, {config.selection.k} per token"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("next", f"moelora inspect {folder}"),
    ]
    _print((folder, rows))


def _print(summary: tuple[Path, list[tuple[str, str]]], table: str = "") -> None:
    """A folder, what is in it, and what was measured."""
    folder, rows = summary
    print(folder)
    for name, value in rows[:-1]:
        print(f"  {name:<12}{value}")
    for line in table.splitlines():
        print(f"  {line}")
    name, value = rows[-1]
    print(f"  {name:<12}{value}")


def _summary(folder: Path) -> tuple[Path, list[tuple[str, str]]]:
    """What an export to LoRAs wrote, as its files say: LoRAs with their ranks, the router, and the next command."""
    router_file = folder / "router.json"
    if not router_file.is_file():
        return folder, [
            ("LoRA", f"one, {_ranks(folder)}"),
            ("next", f"peft.PeftModel.from_pretrained(base, {str(folder)!r})    (needs no moelora)"),
        ]
    router = json.loads(router_file.read_text())
    loras = sorted(path.parent for path in folder.glob("*/adapter_config.json"))
    renamed = [f"{name!r} is {place}" for place, name in router.get("renamed", {}).items()]
    what = "by a task's number" if router["kind"] == "task" else f"by centroids ({router['embedding']})"
    example = "NUMBER" if router["kind"] == "task" else '"PROMPT"'
    return folder, [
        ("LoRAs", f"{len(loras)}: " + ", ".join(f"{lora.name} ({_ranks(lora)})" for lora in loras)),
        *([("renamed", ", ".join(renamed))] if renamed else []),
        ("router", f"{what}, in {', '.join(sorted(path.name for path in folder.glob('rout*')))}"),
        ("base model", router["base_model"] or "not recorded"),
        ("next", f"python {folder / 'route.py'} {example}    (prints the LoRA of a request)"),
    ]


def _ranks(lora: Path) -> str:
    words = json.loads((lora / "adapter_config.json").read_text())
    ranks = sorted({words["r"], *words["rank_pattern"].values()})
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def _only_with_rank(options: argparse.Namespace, needed: str = "--rank") -> None:
    """Refuse options of the distillation where there is none."""
    given = {"--rank": options.rank, "--data": options.data, "--steps": options.steps or None}
    for name, value in given.items():
        if value is not None:
            raise ExportError(f"{name} is {value!r} without {needed}; allowed: with `--to lora --rank R` only.")


def _base(options: argparse.Namespace) -> str | None:
    from moelora.runs.models import resolve_model

    return None if options.base is None else resolve_model(options.base)


def _distill_on_data(options: argparse.Namespace) -> Any:
    from moelora.export import distill_lora
    from moelora.export.adapter import read_config
    from moelora.export.output import check_free
    from moelora.hub.client import CONFIG_FILE, WEIGHTS_FILE
    from moelora.hub.read import local_folder
    from moelora.runs.config import DatasetConfig
    from moelora.runs.data import load_rows
    from moelora.runs.models import ModelSource, load_adapter, load_model, load_tokenizer

    check_free(options.output)
    folder = local_folder(options.adapter, CONFIG_FILE, WEIGHTS_FILE)
    config = read_config(folder)
    name = _base(options) or config.base_model_name_or_path
    if not name:
        raise ExportError("the adapter does not record its base model; allowed: its name or folder, as --base.")
    source = ModelSource(model=name)
    tokenizer = load_tokenizer(source)
    rows = load_rows(DatasetConfig(files=options.data), tokenizer)
    if len(rows) < 2:
        raise ExportError(f"--data {options.data!r} has {len(rows)} row; allowed: at least 2, one of them held out.")
    kept = max(1, len(rows) // 5)
    experts = getattr(config.experts, "names", []) if "task_ids" in config.needs else None
    held_out, train = (
        _batches(rows.select(part), tokenizer, experts) for part in (range(kept), range(kept, len(rows)))
    )
    model = load_adapter(load_model(source), str(folder))
    return distill_lora(model, options.output, rank=options.rank, train=train, held_out=held_out, steps=options.steps)


def _batches(rows: Any, tokenizer: Any, experts: Sequence[str] | None) -> list[dict[str, Any]]:
    """Batches of tokens; with the names of the experts, where the mixture goes by tasks, also `task_ids`."""
    import torch

    from moelora.compose.tokens import batches, tokenize

    found: list[dict[str, Any]] = list(batches(tokenize(rows, tokenizer), _BATCH, "cpu"))
    if experts is None:
        return found
    tasks = [row.get("task") for row in rows]
    unknown = next((task for task in tasks if task not in experts), None)
    if unknown is not None or None in tasks:
        raise ExportError(
            f"a row has the task {unknown!r}, and the mixture goes by tasks; allowed: {', '.join(experts) or 'none'}. "
            "Rows need a column `task` with the name of an expert."
        )
    ids = torch.tensor([experts.index(task) for task in tasks]).split(_BATCH)
    return [{**batch, "task_ids": part} for batch, part in zip(found, ids, strict=True)]
