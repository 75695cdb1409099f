"""`moelora inspect`: what an adapter is."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "inspect",
        help="print what an adapter is",
        description="Print what an adapter is: preset, axes, sites, parameters, base model, versions. Reads its JSON "
        "and the header of its weights; loads no weight and no base model.",
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter, or Hub repository (owner/name)")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--token", help="Hub token for a private repository (default: the one logged in with)")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print what an adapter is."""
    from moelora.hub import read_adapter

    info = read_adapter(options.adapter, revision=options.revision, token=options.token)
    config = info.config
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
