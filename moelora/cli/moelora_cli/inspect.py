"""`moelora inspect`: what an adapter is."""

from __future__ import annotations

import argparse
import dataclasses
import json
from typing import Any

from moelora_cli.parsing import examples


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="print what an adapter is",
        description="Print what an adapter is: preset, axes, sites, parameters, base model, versions. Reads its JSON "
        "and the header of its weights; loads no weight and no base model.",
        epilog=examples("moelora inspect runs/quickstart/adapter", "moelora inspect owner/adapter --json"),
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter, or Hub repository (owner/name)")
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--token", help="Hub token for a private repository (default: the one logged in with)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print what an adapter is."""
    from moelora.hub import read_adapter

    info = read_adapter(options.adapter, revision=options.revision, token=options.token)
    config = info.config
    if options.json:
        print(json.dumps(_as_json(info), indent=2))
        return
    rows = [
        ("preset", config.preset or "none"),
        ("base model", config.base_model_name_or_path or "not recorded"),
        ("task type", str(config.task_type or "none")),
        ("parameters", f"{info.num_parameters:,} stored, {info.num_trainable:,} trainable"),
        ("size", f"{info.num_bytes:,} bytes, {', '.join(info.dtypes)}"),
        ("written by", f"moelora {config.moelora_version}, format {config.format_version}, PEFT {config.peft_version}"),
        *info.axes().items(),
        *(("expert", phrase) for phrase in config.experts.members()),
    ]
    print(info.source)
    for name, value in rows:
        print(f"  {name:<12}{value}")
    print()
    header = ("MODULES", "LAYERS", "NUMBER", "PARAMETERS", "TRAINABLE", "WHAT")
    sites = [
        (s.module, s.layer_ranges(), str(s.count), f"{s.num_parameters:,}", f"{s.num_trainable:,}", s.describe())
        for s in info.sites()
    ]
    widths = [max(map(len, column)) for column in zip(header, *sites, strict=True)]
    for line in (header, *sites):
        print("  " + "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _as_json(info: Any) -> dict[str, Any]:
    config = info.config
    return {
        "source": info.source,
        "preset": config.preset,
        "base_model": config.base_model_name_or_path,
        "task_type": config.task_type,
        "parameters": {"stored": info.num_parameters, "trainable": info.num_trainable},
        "bytes": info.num_bytes,
        "dtypes": list(info.dtypes),
        "versions": {
            "moelora": config.moelora_version,
            "format": config.format_version,
            "peft": config.peft_version,
        },
        "axes": info.axes(),
        "experts": config.experts.members(),
        "sites": [dataclasses.asdict(site) for site in info.sites()],
    }
