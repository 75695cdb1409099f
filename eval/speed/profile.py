"""`python -m eval.speed.profile`: where the time of a training step goes, by kind of operation, from torch.profiler."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from eval.receipt import make_receipt
from eval.speed import models
from eval.speed.measure import batch, restart_in_huge_pages, step
from eval.speed.models import COMPILED, LINEAR_METHODS, LORA, MIXLORA, SLICE, SMOLLM2
from eval.speed.report import facts
from moelora.files import write_atomically
from moelora.runs.quiet import quiet_libraries
from moelora.runs.tables import markdown

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
    ),
    "choice of experts": ("aten::topk", "aten::_softmax", "aten::sigmoid", "aten::cumsum", "aten::bincount"),
    "loss": ("aten::_log_softmax", "aten::nll_loss"),
}
"""Beginnings of operations' names by kind; the rest is Python, autograd's bookkeeping and views."""


REST = "dispatch and the rest"
ROUNDS = 5


def kind_of(name: str) -> str:
    """The kind of a profiled operation; the longest beginning decides."""
    found = [(len(start), kind) for kind, starts in KINDS.items() for start in starts if name.startswith(start)]
    return max(found)[1] if found else REST


def milliseconds(built: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Milliseconds by kind of each method's fastest step: other work on the machine can only add to it.

    The methods take turns, after a step that warms up.
    """
    work = step(batch())
    rounds: dict[str, list[dict[str, float]]] = {name: [] for name in built}
    for model in built.values():
        work(model.train())
    for _ in range(ROUNDS):
        for name, model in built.items():
            with profile(activities=[ProfilerActivity.CPU]) as profiler:
                work(model)
            kinds = dict.fromkeys([*KINDS, REST], 0.0)
            for event in profiler.key_averages():
                kinds[kind_of(event.key)] += event.self_cpu_time_total / 1e3
            rounds[name].append(kinds)
    return {name: min(found, key=lambda kinds: sum(kinds.values())) for name, found in rounds.items()}


def table(columns: dict[str, dict[str, float]]) -> str:
    """Kinds by method, and what the first method's step would cost with another's matrix products."""
    first = next(iter(columns.values()))
    sums = {name: sum(column.values()) for name, column in columns.items()}
    base = sum(first.values())
    products = "matrix products"
    rows = [[kind, *(f"{column[kind]:.0f}" for column in columns.values())] for kind in first]
    rows.append(["sum", *(f"{value:.0f}" for value in sums.values())])
    rows.append(["ratio", *(f"{value / base:.2f}" for value in sums.values())])
    bound = [(base + column[products] - first[products]) / base for column in columns.values()]
    rows.append(["ratio, were only its products slower", *(f"{value:.2f}" for value in bound)])
    return markdown(["ms per step, profiled", *columns], rows)


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed.profile", description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("eval/results/speed/profile.md"))
    output = parser.parse_args(arguments).output
    restart_in_huge_pages("eval.speed.profile", arguments)
    quiet_libraries()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # or torch says on the screen when the profiler starts and stops
    started = time.time()
    sections = []
    for name in (SMOLLM2, SLICE):
        base = models.load_base(name, torch.bfloat16)
        blocks = {
            LORA: models.lora(base),
            MIXLORA: models.moelora(base, "mixlora"),
            COMPILED: models.moelora(base, "mixlora", compiled=True),
        }
        linears = {method: build(base) for method, build in LINEAR_METHODS.items()}
        for built in (blocks, linears):
            sections.append(f"## {name}, bf16\n\n{table(milliseconds(built))}\n")
            print(sections[-1], flush=True)
    seconds = time.time() - started
    receipt = make_receipt(config={}, seeds={"weights": 0}, seconds=seconds, command="python -m eval.speed.profile")
    write_atomically(
        output,
        f"# Where a training step's time goes\n\n{facts(receipt)} 8 x 128 tokens, the fastest of {ROUNDS} steps of "
        "each method, in turns. The profiler itself costs time, so sums exceed the timings of `speed.md`. The last row "
        "is a bound: the step of the first method, with the matrix products of the other and nothing else added.\n\n"
        + "\n".join(sections),
    )


if __name__ == "__main__":
    main()
