"""`moelora params`: what a run will need, before anything is loaded."""

from __future__ import annotations

import argparse
import json
from typing import Any

from moelora_cli.parsing import examples, listed


def add_parser(commands: Any) -> argparse.ArgumentParser:
    """Add the command to those of `moelora`."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "params",
        help="say what a run will need, before anything is loaded",
        description="Print how many parameters the adapter of a run trains and how many of them work on a token, and "
        "estimate the memory of training on one device and the operations of an optimizer step. It reads the "
        "config.json of the base model and no weights. The memory is that of full sequences; give --length where your "
        "rows are shorter. Kernels' scratch memory comes on top.",
        epilog=examples(
            "moelora params run.yaml",
            "moelora params configs/quickstart-joint.yaml --length 128",
            "moelora params run.yaml --model Qwen/Qwen2.5-7B training.per_device_train_batch_size=1 --json",
        ),
    )
    parser.add_argument("config", metavar="CONFIG", help="the YAML file of a run")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="change a value of the file; dots for nesting"
    )
    parser.add_argument("--model", metavar="NAME", help="another base model: a name on the Hub or a folder")
    parser.add_argument(
        "--length", type=int, metavar="N", help="tokens of a sequence (default: training.max_length, which is 1024)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON")
    return parser


def run(options: argparse.Namespace) -> None:
    """Print the sizes and the estimate.

    Raises:
        MoeLoraError: If the configuration is not valid, or the adapter does not fit the model.
    """
    from moelora.runs.config import load_config
    from moelora.runs.estimate import estimate
    from moelora.runs.quiet import quiet_libraries

    quiet_libraries()
    model = [] if options.model is None else [f"model={options.model}"]
    config = load_config(options.config, [*options.overrides, *model])
    found = estimate(config, options.length)
    if options.json:
        print(json.dumps({"model": config.model, **found.to_json()}, indent=2))
        return
    sizes, memory = found.parameters, found.to_json()["memory"]
    again = ", computed again in the backward pass" if found.checkpointing else ""
    what = {
        "base": f"weights of the base in {config.dtype}",
        "adapter": "weights of the adapter",
        "gradients": "gradients of the adapter",
        "optimizer": f"state of {found.optimizer}",
        "activations": f"activations of {found.sequences} x {found.length} tokens{again}",
        "sum": "together, at least",
    }
    micro = f" x {found.micro_batches} micro-batches" if found.micro_batches > 1 else ""
    print(f"{config.model}: {sizes.base:,} parameters")
    print(f"{config.adapter.get('preset') or config.adapter.get('path')}: {sizes.trainable:,} trainable parameters")
    print(f"  ({sizes.trainable / sizes.base:.2%} of the base), {sizes.active:,} work on a token")
    print("Memory of training on one device, estimated")
    print(listed([(f"{memory[key] / 2**30:9.3f} GiB", words) for key, words in what.items()]))
    tokens = f"{found.sequences} x {found.length} tokens{micro}"
    print(f"Operations of an optimizer step on {tokens}: {found.flops:.3g}")
