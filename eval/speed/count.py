"""`python -m eval.speed --count`: what each preset launches, keeps and computes beside PEFT's LoRA; nothing is timed.

One decoder block of the size of a real model, and its feed-forward block alone, forward and backward on meta tensors,
which take the path of a GPU. LoRA is on the same linears.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from eval.receipt import make_receipt
from eval.speed import shapes
from eval.speed.counting import Launches, ReadsBackError, count, graph_breaks, with_triton
from eval.speed.report import facts
from eval.speed.shapes import BLOCK, FEED_FORWARD, SHAPES
from moelora import presets
from moelora.errors import MoeLoraError
from moelora.files import write_atomically
from moelora.routing.run import find_hooks
from moelora.runs.tables import markdown
from moelora.training.metrics import RoutingMetrics
from moelora.training.micro_batch import MicroBatchBalance

SEQUENCES, LENGTH = 4, 1024
LIMITS = {"launches": 2.5, "saved": 1.15, "flops": 1.10}
"""The ratios to LoRA that were asked for."""

LAYERS = (2, 30)
"""Decoder blocks of the models whose balance losses and metrics are counted."""

HEADER = ["preset", "LoRA's r", "launches", "x LoRA", "MiB saved", "x LoRA", "FLOPs x LoRA", "waits", "graph breaks"]

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    **{preset: (preset, {}) for preset in presets.available()},
    "mixlora, no dropout": ("mixlora", {"lora_dropout": 0.0}),
    "mixlora, 64 experts": ("mixlora", {"num_experts": 64}),
}
"""Preset and words by the name in the table."""


def rows_of(shape: str) -> tuple[list[dict[str, Any]], dict[str, str]]:
    """Counts of all presets on one shape, also with Triton where that changes them, and why some are not counted."""
    base = shapes.base(shape)
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for name, (preset, words) in VARIANTS.items():
        try:
            adapted = shapes.mixture(base, preset, **words)
            ranks = shapes.ranks_of(adapted)
            peer = shapes.lora(base, ranks, shapes.dropout_of(adapted))
            for part in (BLOCK, FEED_FORWARD):
                # by itself the feed-forward block has no batch, which some routers read
                if part == FEED_FORWARD and (adapted.reads_batch or not any(".mlp." in each for each in ranks)):
                    continue
                mine = count(adapted.model, adapted.forward(part, SEQUENCES, LENGTH))
                theirs = count(peer.model, peer.forward(part, SEQUENCES, LENGTH))
                with with_triton():
                    fused = count(adapted.model, adapted.forward(part, SEQUENCES, LENGTH))
                for called, found in {name: mine, f"{name}, with Triton": fused}.items():
                    if found is fused and fused == mine:
                        continue
                    row = {"shape": shape, "preset": called, "part": part, "lora_r": sorted(set(ranks.values()))}
                    over = found.over(theirs)
                    rows.append({**row, "count": found.as_dict(), "lora": theirs.as_dict(), "over_lora": over})
        except (MoeLoraError, ReadsBackError) as error:
            reasons[name] = str(error)
    return rows, reasons


def after_the_layers(preset: str, layers: int) -> int | None:
    """Launches of a training step for the balance losses, the metrics and the move of the biases of all layers.

    None of a preset that reads facts of the batch or does not route.
    """
    adapted = shapes.mixture(shapes.base("SmolLM2-135M", layers=layers), preset)
    hooks, config = find_hooks(adapted.model), adapted.model.peft_config["default"]
    assert hooks is not None
    if adapted.reads_batch or not hooks.mixtures():
        return None
    launches, when_done = Launches(), hooks.when_done

    def done(*run: Any) -> None:
        with launches:
            when_done(*run)

    hooks.when_done = done
    with hooks.listening(gradients_only=True) as listener:
        loss = adapted.forward(BLOCK, 1, 64)().sum()
    step = MicroBatchBalance(listener, config.balance, config.balance_scope, hooks.mixtures(), layers=hooks.layers)
    metrics = RoutingMetrics(hooks.mixtures(), loss.device)
    with launches:
        step.add_to(loss, divided_later=False)
        metrics.add(step)
    return launches.total


def all_after_the_layers() -> dict[str, list[int]]:
    """The same of each preset that has any, for each of `LAYERS`."""
    found: dict[str, list[int]] = {}
    for preset in presets.available():
        try:
            counts = [after_the_layers(preset, layers) for layers in LAYERS]
        except (MoeLoraError, ReadsBackError):
            continue
        known = [count for count in counts if count is not None]
        found |= {preset: known} if known else {}
    return found


def all_graph_breaks() -> dict[str, int]:
    """Graph breaks of each preset on the smallest shape, on the CPU; they depend on neither."""
    base, found = shapes.base("SmolLM2-135M", "cpu"), {}
    for preset in presets.available():
        try:
            found[preset] = graph_breaks(shapes.mixture(base, preset).forward(BLOCK, 1, 64))
        except MoeLoraError:
            continue
        print(f"  {preset}: {found[preset]} graph breaks", flush=True)
    return found


def table(rows: list[dict[str, Any]], breaks: Mapping[str, int], shape: str, part: str) -> str:
    """The counts of one part of one shape; ratios above what was asked for are bold."""
    lines = []
    for row in rows:
        if (row["shape"], row["part"]) != (shape, part):
            continue
        mine = row["count"]
        launches, saved, flops = (
            f"**{row['over_lora'][key]:.2f}**" if row["over_lora"][key] > limit else f"{row['over_lora'][key]:.2f}"
            for key, limit in LIMITS.items()
        )
        name = row["preset"]
        kept = f"{mine['saved'] / 2**20:.0f}"
        both = f"{mine['forward']} + {mine['backward']}"
        ranks = " / ".join(map(str, row["lora_r"]))
        lines.append([name, ranks, both, launches, kept, saved, flops, str(mine["syncs"]), str(breaks.get(name, ""))])
    return markdown(HEADER, lines)


def write(results: Mapping[str, Any], output: Path) -> str:
    """Write `counts.json` and `counts.md`; returns the tables of the feed-forward block, and where the files are."""
    rows, breaks, reasons = results["rows"], results["graph_breaks"], results["not_counted"]
    text = [
        "# What a step launches, keeps and computes\n",
        f"{facts(results['receipt'])} Counted on meta tensors, which take the path of a GPU. **Never run on a GPU, and "
        "nothing here is a time.** "
        f"{SEQUENCES} x {LENGTH} tokens in bf16, adapters too, in training mode with each preset's own dropout; "
        "forward and backward, without balance losses.\n",
        "*launches*: operators that compute or move data, forward + backward. *saved*: what the backward pass keeps "
        "beside the weights. *FLOPs*: of the matrix products, attention's left out. *waits*: operators for which the "
        "host waits for the device. *graph breaks*: of `torch.compile`. *x LoRA*: over PEFT's LoRA on the same linears "
        "with the same dropout; its r is one expert's where experts are whole blocks, that of all experts together on "
        "single linears, and 16 for experts that are no LoRAs. Bold: above what was asked for (launches "
        f"{LIMITS['launches']}, saved {LIMITS['saved']}, FLOPs {LIMITS['flops']}). *with Triton*: mixtures on "
        "linears, and plain LoRAs, by Triton's kernels, of which each is one launch.\n",
        *(
            f"## {shape}, {part}\n\n{table(rows, breaks, shape, part)}\n"
            for shape in SHAPES
            for part in (FEED_FORWARD, BLOCK)
        ),
        "## Balance losses, metrics and moves of biases\n",
        "Launches of a training step on SmolLM2-135M for these of all layers together, with as many decoder blocks.\n",
        markdown(
            ["preset", *(f"{layers} blocks" for layers in LAYERS)],
            [[name, *map(str, counts)] for name, counts in results["after_the_layers"].items()],
        )
        + "\n",
        "## Not counted\n",
        "\n".join(f"- `{name}`: {reason}" for name, reason in reasons.items()) + "\n",
    ]
    write_atomically(output / "counts.json", json.dumps(dict(results), indent=1) + "\n")
    write_atomically(output / "counts.md", "\n".join(text))
    shown = [f"{shape}, {FEED_FORWARD}\n{table(rows, breaks, shape, FEED_FORWARD)}\n" for shape in SHAPES]
    return "\n".join([*shown, f"report   {output / 'counts.md'}", f"numbers  {output / 'counts.json'}"])


def run(output: Path) -> None:
    """Count, and write the report."""
    logging.getLogger("moelora").setLevel(logging.ERROR)  # that nobody adds the balance loss is meant here
    started = time.time()
    rows: list[dict[str, Any]] = []
    reasons: dict[str, str] = {}
    for shape in SHAPES:
        print(shape, flush=True)
        found, why = rows_of(shape)
        rows += found
        reasons |= why
    after, breaks = all_after_the_layers(), all_graph_breaks()
    config = {"sequences": SEQUENCES, "length": LENGTH, "dtype": "bfloat16", "limits": LIMITS}
    seconds = time.time() - started
    receipt = make_receipt(config=config, seeds={}, seconds=seconds, command="python -m eval.speed --count")
    counts = {"rows": rows, "graph_breaks": breaks, "after_the_layers": after, "not_counted": reasons}
    print(write({"receipt": receipt, **counts}, output))
