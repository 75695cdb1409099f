"""`moelora compose`: a mixture of LoRAs that exist."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compose",
        help="make a mixture of LoRAs that exist",
        description="Make a mixture of PEFT LoRAs that exist: each is an expert, and a router chooses among them. "
        "Ranks, alphas and target modules may differ. Give the LoRAs as words, or all in a YAML file with --config.",
        epilog=examples(
            "moelora compose sums=runs/sums words=owner/words --router centroids --data rows.jsonl -o runs/mix",
            "moelora compose --config configs/compose/quickstart.yaml",
        )
        + "\nrows.jsonl has the columns prompt and task; task is the name of a LoRA.",
    )
    parser.add_argument("loras", metavar="[NAME=]LORA", nargs="*", help="folder or Hub name of a LoRA, with its name")
    parser.add_argument("--config", help="YAML file with the keys model, loras, router, dataset, output_dir, trainable")
    parser.add_argument("--router", help="kind of the router, or a YAML mapping: '{kind: arrow, top_k: 2}'")
    parser.add_argument("--base", metavar="MODEL", help="the base model (default: the one that the first LoRA names)")
    parser.add_argument("--data", nargs="+", metavar="FILE", help="rows to fit the router on, with a column task")
    parser.add_argument("--trainable", action="store_true", default=None, help="let training move the experts too")
    parser.add_argument(
        "--any-base-name", action="store_true", help="take LoRAs that name another base model of the same sizes"
    )
    parser.add_argument("-o", "--output", metavar="FOLDER", help="folder of the new adapter; it must not exist")
    return parser


def run(options: argparse.Namespace) -> None:
    """Compose, save, and say what was made."""
    from moelora.runs.compose import compose, compose_config

    compose(compose_config(options), any_base_name=options.any_base_name)
