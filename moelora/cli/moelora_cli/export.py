"""`moelora export`: an adapter as a model, or as an adapter of another kind."""

from __future__ import annotations

import argparse
from typing import Any

from moelora_cli.parsing import examples

TARGETS = ("lora", "mixlora", "moelora", "native-moe")
"""What `--to` takes."""


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "export",
        help="write an adapter in another form",
        description="Write an adapter in another form. lora: ordinary PEFT LoRAs and a router that picks one per "
        "request, or one LoRA; with --rank one LoRA that approximates any mixture. mixlora: a folder of MixLoRA's "
        "authors. moelora: such a folder as an adapter of moelora. native-moe: the adapter and its dense base as one "
        "mixture-of-experts model, which transformers loads without moelora.",
        epilog=examples(
            "moelora export runs/quickstart/adapter model --to native-moe",
            "moelora export mix loras --to lora",
            "moelora export mix one --to lora --rank 16 --data rows.jsonl",
            "moelora export runs/quickstart/adapter folder --to mixlora",
        ),
    )
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of a saved adapter, or Hub repository (owner/name)")
    parser.add_argument("output", metavar="OUT", help="the folder to make")
    parser.add_argument("--to", required=True, choices=TARGETS, help="the form to write")
    parser.add_argument("--base", help="the base model: a folder or a Hub name (default: what the adapter names)")
    distil = parser.add_argument_group("one LoRA for a whole mixture (--to lora)")
    distil.add_argument("--rank", type=int, help="rank of the LoRA")
    distil.add_argument(
        "--data", nargs="+", metavar="FILE", help="rows to measure on, in the forms that training takes"
    )
    distil.add_argument("--steps", type=int, default=0, help="train the LoRA towards the mixture for so many steps")
    native = parser.add_argument_group("a native mixture-of-experts model (--to native-moe)")
    native.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), help="data type of the weights (default: the base's)"
    )
    native.add_argument("--max-shard-size", default="5GB", help="largest file of weights (default: %(default)s)")
    native.add_argument("--no-check", action="store_true", help="do not run the result beside the adapter")
    return parser


def run(options: argparse.Namespace) -> None:
    """Write the adapter in the form asked for."""
    from moelora_cli.export_adapters import export_lora, export_mixlora, import_mixlora
    from moelora_cli.export_native_moe import export_native_moe

    writers = (export_lora, export_mixlora, import_mixlora, export_native_moe)
    dict(zip(TARGETS, writers, strict=True))[options.to](options)
