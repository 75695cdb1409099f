"""`python -m eval.speed_profile`: where the time of a training step goes, by kind of operation, from torch.profiler."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eval import speed_models as models
from eval.speed_measure import batch, step
from eval.speed_models import COMPILED, LORA, MIXLORA, SMOLLM2
from eval.tables import markdown

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "activation": ("aten::silu",),
    "gather and scatter": ("aten::index", "aten::gather", "aten::scatter", "aten::_embedding_bag"),
    "compiled loops": ("## Call CompiledFxGraph",),
    "element-wise, copies, sums": (
        "aten::mul",
        "aten::add",
        "aten::copy_",
        "aten::fill_",
        "aten::sum",
        "aten::div",
        "aten::pow",
        "aten::neg",
        "aten::cat",
        "aten::mean",
        "aten::topk",
        "aten::_softmax",
    ),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
}
"""Beginnings of operations' names by kind; the rest is Python, autograd's bookkeeping and views."""


def kind_of(name: str) -> str:
    """The kind of a profiled operation; the longest beginning decides."""
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else "dispatch and the rest"


def milliseconds(model: Any) -> dict[str, float]:
    """Milliseconds a step by kind, after a step that warms up."""
    work = step(batch())
    model.train()
    work(model)
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(3):
            work(model)
    total = dict.fromkeys([*KINDS, "dispatch and the rest"], 0.0)
    for event in profiler.key_averages():
        total[kind_of(event.key)] += event.self_cpu_time_total / 3e3
    return total


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed_profile", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("eval/results/speed/profile.md"))
    output = parser.parse_args(arguments).output
    base = models.load_base(SMOLLM2, torch.bfloat16)
    built = {
        LORA: models.lora(base),
        MIXLORA: models.moelora(base, "mixlora"),
        COMPILED: models.moelora(base, "mixlora", compiled=True),
    }
    columns = {name: milliseconds(model) for name, model in built.items()}
    kinds = [*next(iter(columns.values()))]
    rows = [[kind, *(f"{column[kind]:.0f}" for column in columns.values())] for kind in kinds]
    rows.append(["sum", *(f"{sum(column.values()):.0f}" for column in columns.values())])
    table = markdown(["ms a step, profiled", *columns], rows)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(
        f"# Where a training step's time goes\n\n`python -m eval.speed_profile`: {SMOLLM2}, bf16, 8 x 128 tokens. The "
        f"profiler itself costs time, so sums exceed the timings of `speed.md`.\n\n{table}\n"
    )
    print(table)


if __name__ == "__main__":
    main()
