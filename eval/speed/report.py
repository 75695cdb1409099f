"""The report of the speed benchmark: targets, table and picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from eval import figures
from eval.speed.measure import quartiles
from eval.speed.models import (
    BESIDE,
    COMPILED,
    DROPPED,
    FIRST,
    IMPORT_MOELORA,
    IMPORT_PEFT,
    LORA,
    LORA64,
    MANY,
    MIXLORA,
    MOLORA,
    NEXT,
    PYPI,
    RANK,
    SHARED,
    SIRA,
    SLICE,
    SMOLLM2,
    SMORA,
)
from moelora.files import write_atomically
from moelora.runs.tables import markdown
from moelora.runs.wording import commit_words

TARGETS: list[tuple[str, str, str, str, str, float]] = [
    *(
        (model, dtype, "step", method, LORA, limit)
        for model, dtype, method, limit in (
            (SMOLLM2, "bf16", MIXLORA, 1.08),
            (SLICE, "bf16", MIXLORA, 1.05),
            (SMOLLM2, "bf16", COMPILED, 1.12),
            (SLICE, "bf16", COMPILED, 1.12),
            (SMOLLM2, "fp32", MIXLORA, 1.25),
            (SLICE, "fp32", MIXLORA, 1.25),
        )
    ),
    (SMOLLM2, "bf16", "step", BESIDE, PYPI, 0.30),
    (SLICE, "bf16", "step", BESIDE, PYPI, 0.60),
    *(
        (model, "bf16", "step", method + routers, LORA64, 1.10)
        for model in (SMOLLM2, SLICE)
        for method in (SIRA, MOLORA, SMORA)
        for routers in ("", SHARED)
    ),
    *((model, "bf16", "step", DROPPED, MIXLORA, 1.05) for model in (SMOLLM2, SLICE)),
    (SMOLLM2, "bf16", "decode", MIXLORA, LORA, 1.10),
    (SLICE, "bf16", "decode", MIXLORA, LORA, 1.10),
    (SMOLLM2, "bf16", "lm-eval", MIXLORA, LORA, 1.05),
    (SMOLLM2, "bf16", "memory", MIXLORA, LORA, 1.15),
    (SLICE, "bf16", "memory", MIXLORA, LORA, 1.15),
    (SLICE, "bf16", "step", MANY, MIXLORA, 1.30),
]
"""(model, dtype, metric, method, peer, the ratio that was asked for)."""


HEADER = ["ratio of medians", "model", "metric", "measured", "by round", "asked for", "reached"]


def ratios(rows: list[dict[str, Any]]) -> list[list[str]]:
    """The table of targets: those whose two sides were measured.

    "By round" has the quartiles of the ratio of the calls that followed each other; it says how far the machine's
    weather reaches into the ratio of medians.
    """
    measured = {(row["model"], row["dtype"], row["metric"], row["method"]): row for row in rows}
    table = []
    for model, dtype, metric, method, peer, limit in TARGETS:
        mine, theirs = measured.get((model, dtype, metric, method)), measured.get((model, dtype, metric, peer))
        if mine is None or theirs is None:
            continue
        ratio = mine["median"] / theirs["median"]
        # memory has no calls
        calls = zip(mine.get("seconds", []), theirs.get("seconds", []), strict=True)
        rounds = [a / b for a, b in calls]
        between = "{:.2f} to {:.2f}".format(*quartiles(rounds)) if rounds else ""
        reached = "yes" if ratio <= limit else "**no**"
        what = [f"{method} / {peer}", f"{model}, {dtype}", metric]
        table.append([*what, f"{ratio:.2f}", between, f"{limit:.2f}", reached])
    return table


def measurements(rows: list[dict[str, Any]]) -> list[list[str]]:
    """Every measurement on a whole model."""
    table = []
    for row in rows:
        if "=" in row["metric"]:
            continue
        size = row["metric"] == "memory"
        unit, scale = ("MiB", 1 / 2**20) if size else ("ms", 1e3)
        middle = f"{scale * row['median']:.0f}" if row["metric"] != "decode" else f"{scale * row['median']:.1f}"
        between = "" if size else f"{scale * row['q1']:.0f} to {scale * row['q3']:.0f}"
        name = ", ".join(filter(None, (row["model"], row["dtype"])))
        table.append([row["method"], name, row["metric"], f"{middle} {unit}", between, str(row["n"])])
    return table


def start(rows: list[dict[str, Any]]) -> str:
    """What an import and a first step take, in words; empty where they were not measured."""
    found = {(row["metric"], row["method"]): row["median"] for row in rows}
    if ("import", IMPORT_MOELORA) not in found:
        return ""
    first, after = (found[metric, MIXLORA] for metric in (FIRST, NEXT))
    return (
        f"`import moelora` takes {found['import', IMPORT_MOELORA]:.2f} s in a new process, `import peft` "
        f"{found['import', IMPORT_PEFT]:.2f} s (asked for: at most 1 s more). MixLoRA's "
        f"first step takes {first / after:.2f} times one of the steps after it, LoRA's "
        f"{found[FIRST, LORA] / found[NEXT, LORA]:.2f} times: nothing is compiled before it unless `compute: compiled` "
        "asks for it.\n"
    )


def facts(receipt: dict[str, Any]) -> str:
    """Where, when and with what it was measured, in a sentence."""
    machine, versions = receipt["machine"], receipt["packages"]
    return (
        f"`{receipt['command']}` on {machine['processor']}, {machine['threads']} threads, in "
        f"{receipt['wall_seconds'] / 60:.0f} minutes; torch {versions['torch']}, transformers "
        f"{versions['transformers']}, peft {versions['peft']}; commit: {commit_words(receipt['git'])}."
    )


def write_report(results: dict[str, Any], output: Path) -> str:
    """Write `speed.md` and `speed.png` beside `speed.json`; returns the table of targets and where the files are."""
    receipt, rows = results["receipt"], results["rows"]
    targets = markdown(HEADER, ratios(rows))
    parity = "; ".join(f"{name}: {error:.1e}" for name, error in results["parity"].items())
    text = [
        "# What a mixture costs\n",
        facts(receipt) + "\n",
        "A step is forward and backward of 8 x 128 tokens with our balance losses (the peers have none), adapters in "
        "the base's data type, E = 8, top-2, r = 16, transformers' default attention; decode is one token of one "
        "sequence after a prompt of 32; lm-eval is its log-likelihoods of 16 answers of 16 tokens to prompts of 112; "
        "memory is what two steps add to the peak of a process with the model loaded. "
        "All timings were made with "
        f"{receipt['config']['allocator'] or 'the allocator as it is'} in the environment, memory without. Methods run "
        "in turns. SmolLM2-135M has its real weights (4-bit GGUF, converted); the Llama slice is 4 random layers of "
        "2048/5632.\n",
        f"In fp32 PyPI mixlora gives our logits up to this share of the adapter's effect: {parity}.\n",
        targets + "\n",
        start(rows),
        "## All measurements\n",
        markdown(["method", "model", "metric", "median", "quartiles", "n"], measurements(rows)) + "\n",
    ]
    write_atomically(output / "speed.md", "\n".join(text))
    draw(rows, output / "speed.png")
    files = {"report": "speed.md", "picture": "speed.png", "numbers": "speed.json"}
    return "\n".join([targets, "", *(f"{what:8s} {output / name}" for what, name in files.items())])


def write_gpu_report(results: dict[str, Any], output: Path) -> str:
    """Write `gpu.md` beside `gpu.json`; returns its table."""
    receipt, rows = results["receipt"], results["rows"]
    measured = {(row["dtype"], row["metric"], row["method"]): row["median"] for row in rows}
    others = list(dict.fromkeys(row["method"] for row in rows if row["method"] != LORA))
    lines = []
    for dtype, metric in dict.fromkeys((row["dtype"], row["metric"]) for row in rows):
        one = measured.get((dtype, metric, LORA))
        unit, scale = ("MiB", 1 / 2**20) if metric.startswith("memory") else ("ms", 1e3)
        cells = ["did not fit" if one is None else f"{scale * one:.1f} {unit}"]
        for method in others:
            value = measured.get((dtype, metric, method), "")
            cells.append("did not fit" if value is None else f"{value / one:.2f}" if value != "" and one else "")
        lines.append([dtype, metric, *cells])
    config = receipt["config"]
    layers, width, inner = (config[key] for key in ("num_hidden_layers", "hidden_size", "intermediate_size"))
    errors = "; ".join(f"{name}: {error:.1e}" for name, error in results["parity"].items())
    found = markdown(["base", "metric", LORA, *(f"{method}, x LoRA" for method in others)], lines)
    text = [
        "# What a mixture costs on a GPU\n",
        f"{config['device']}. {facts(receipt)}\n",
        f"A base of {layers} random layers of {width}/{inner}; medians of {config['rounds']} calls in turns (decoding: "
        f"{4 * config['rounds']}). A step is forward and backward with our balance losses (the peers have none), in "
        f"sequences of {config['length']} tokens; memory is what it needs beside the loaded model. In fp32, as shares, "
        f"from PyPI mixlora's logits and from our reference's gradients: {errors}.\n",
        found + "\n",
    ]
    write_atomically(output / "gpu.md", "\n".join(text))
    return "\n".join([found, "", f"report   {output / 'gpu.md'}", f"numbers  {output / 'gpu.json'}"])


def draw(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of the training step, and how one layer's step grows."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    groups = sorted({(row["model"], row["dtype"]) for row in rows if row["metric"] == "step"}, reverse=True)
    axes_of_growth = [a for a in ("tokens", "experts", "top_k", "rank") if any(r["metric"].startswith(a) for r in rows)]
    columns = max(len(groups), len(axes_of_growth))
    height = 2 if axes_of_growth else 1
    figure, axes = pyplot.subplots(height, columns, figsize=(4.6 * columns, 4.2 * height), squeeze=False)
    for axis in axes.flat:
        axis.set_visible(False)
    for axis, (model, dtype) in zip(axes[0], groups, strict=False):
        bars = [row for row in rows if (row["model"], row["dtype"], row["metric"]) == (model, dtype, "step")]
        names, medians = [row["method"] for row in bars], [row["median"] for row in bars]
        low = [max(0.0, row["median"] - row["q1"]) for row in bars]
        high = [max(0.0, row["q3"] - row["median"]) for row in bars]
        colours = ["tab:orange" if not name.startswith(("PEFT", "PyPI", "frozen")) else "tab:gray" for name in names]
        axis.set_visible(True)
        axis.barh(names, medians, xerr=[low, high], color=colours)
        axis.invert_yaxis()
        axis.set_title(f"training step, {model}, {dtype}", fontsize=10)
        axis.set_xlabel("seconds (median, quartiles)")
        axis.tick_params(axis="y", labelsize=7)
    for axis, name in zip(axes[-1], axes_of_growth, strict=False):
        axis.set_visible(True)
        for method, colour in ((LORA, "tab:gray"), (MIXLORA, "tab:orange")):
            points = sorted(
                (int(row["metric"].partition("=")[2]), row["median"])
                for row in rows
                if row["metric"].startswith(f"{name}=") and row["method"] == method
            )
            axis.plot(*zip(*points, strict=True), marker="o", color=colour, label=method.replace(f" r={RANK}", ""))
        axis.set_xscale("log", base=2)
        axis.set_ylim(bottom=0)
        axis.set_xlabel(name)
        axis.set_ylabel("seconds per step, one layer")
        axis.legend(fontsize=8)
    figure.tight_layout()
    figures.save(figure, path, dpi=110)
    pyplot.close(figure)
