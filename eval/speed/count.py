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
from eval.speed.counting import ReadsBackError, count, graph_breaks, with_triton
from eval.speed.report import facts
from eval.speed.shapes import BLOCK, FEED_FORWARD, SHAPES
from moelora import presets
from moelora.errors import MoeLoraError
from moelora.files import write_atomically
from moelora.runs.tables import markdown

SEQUENCES, LENGTH = 4, 1024
LIMITS = {"launches": 2.5, "saved": 1.15, "flops": 1.10}
"""The ratios to LoRA that were asked for."""

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
    breaks = all_graph_breaks()
    config = {"sequences": SEQUENCES, "length": LENGTH, "dtype": "bfloat16", "limits": LIMITS}
    seconds = time.time() - started
    receipt = make_receipt(config=config, seeds={}, seconds=seconds, command="python -m eval.speed --count")
    print(write({"receipt": receipt, "rows": rows, "graph_breaks": breaks, "not_counted": reasons}, output))
