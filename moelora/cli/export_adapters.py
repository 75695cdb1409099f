"""`moelora export --to lora`, `--to mixlora` and `--to moelora`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from moelora.errors import ExportError

_BATCH = 8


def export_lora(options: argparse.Namespace) -> None:
    """Write a mixture as ordinary LoRAs, or as one, and print what was written."""
    from moelora.export import distill_lora, export_loras

    if options.rank is None:
        _only_with_rank(options)
        print(export_loras(options.adapter, options.output, base=_base(options)))
    elif options.data is None:
        found = distill_lora(
            options.adapter, options.output, rank=options.rank, steps=options.steps, base=_base(options)
        )
        print(f"{found.output}\n{found.table()}")
    else:
        print(_distill_on_data(options))


def export_mixlora(options: argparse.Namespace) -> None:
    """Write a folder of MixLoRA's authors and print where it is."""
    from moelora.export import write_mixlora

    _only_with_rank(options, "--to lora")
    print(write_mixlora(options.adapter, options.output, base=_base(options)))


def import_mixlora(options: argparse.Namespace) -> None:
    """Write a folder of MixLoRA's authors as an adapter of moelora and print where it is."""
    from moelora.export import read_mixlora

    _only_with_rank(options, "--to lora")
    print(read_mixlora(options.adapter, options.output, base=_base(options)))


def _only_with_rank(options: argparse.Namespace, needed: str = "--rank") -> None:
    """Refuse options of the distillation where there is none."""
    given = {"--rank": options.rank, "--data": options.data, "--steps": options.steps or None}
    for name, value in given.items():
        if value is not None:
            raise ExportError(f"{name} is {value!r} without {needed}; allowed: with `--to lora --rank R` only.")


def _base(options: argparse.Namespace) -> str | None:
    from moelora.runs.models import resolve_model

    return None if options.base is None else resolve_model(options.base)


def _distill_on_data(options: argparse.Namespace) -> str:
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
    found = distill_lora(model, options.output, rank=options.rank, train=train, held_out=held_out, steps=options.steps)
    return f"{found.output}\n{found.table()}"


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
