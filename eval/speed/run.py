"""What the speed benchmark measures: parity first, then groups of methods in turns."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from eval.speed import models
from eval.speed.measure import (
    HUGE_PAGES,
    Decode,
    LmEval,
    batch,
    forward,
    interleaved,
    peak_memory,
    spread,
    step,
)
from eval.speed.models import (
    COMPILED,
    DROPPED,
    DTYPES,
    FIRST,
    IMPORT_MOELORA,
    IMPORT_PEFT,
    LINEAR_METHODS,
    LORA,
    MANY,
    MIXLORA,
    NEW_PROCESS,
    NEXT,
    OTHERS,
    RANK,
    SHARING_METHODS,
    SLICE,
    SMOLLM2,
)
from moelora.runs.models import DEMO_MODEL, ModelSource, load_tokenizer

PARITY = 1e-3
"""Allowed distance of the logits, as a share of the adapter's effect on them; in fp32, where nothing ties."""


@dataclass
class Run:
    """Measurements so far.

    Attributes:
        rounds: Timed calls of each method.
        rows: One for each method and metric.
        parity: Distance to the authors' package by model.
    """

    rounds: int
    rows: list[dict[str, Any]]
    parity: dict[str, float]

    def add(self, group: tuple[str, str], metric: str, seconds: dict[str, list[float]]) -> None:
        """Keep a group's timings and say them."""
        model, dtype = group
        for method, values in seconds.items():
            row = {"model": model, "dtype": dtype, "metric": metric, "method": method, **spread(values)}
            self.rows.append(row)
            print(f"  {model:13s} {dtype} {metric:8s} {method:38s} {1e3 * row['median']:9.1f} ms", flush=True)


def check_parity(run: Run, model: str, device: str = "cpu") -> Any:
    """Compare with the authors' package, on the device that is measured; gives the base, in fp32.

    Raises:
        SystemExit: If it does not give our logits; nothing is reported then.
    """
    base = models.load_base(model, torch.float32)
    base = base.to(device) if device != "cpu" else base
    error = models.parity_error(base)
    run.parity[model] = error
    if not error <= PARITY:
        raise SystemExit(
            f"{model}: the logits of our MixLoRA and of PyPI mixlora differ by {error:.2g} of the adapter's effect; "
            f"allowed: {PARITY}. No timing is reported."
        )
    print(f"  {model}: equal to PyPI mixlora up to {error:.1g} of the adapter's effect", flush=True)
    return base


def compare(run: Run, model: str, dtype: str, quick: bool) -> None:
    """All methods on one base."""
    group = (model, dtype)
    base = models.load_base(model, DTYPES[dtype])
    builders = models.main_methods(models.equal_rank(base))
    if quick or dtype == "fp32":
        builders = {name: builders[name] for name in (LORA, MIXLORA, COMPILED)}
    built = {name: build(base) for name, build in builders.items()}
    if model == SLICE and dtype == "bf16":
        built[MANY] = models.moelora(base, "mixlora", num_experts=64)
    run.add(group, "step", interleaved(built, step(batch()), run.rounds, train=True))
    if dtype == "fp32":
        return
    built.pop(DROPPED, None)  # there is no dropout outside of training
    few = max(2, run.rounds // 2)
    run.add(group, "forward", interleaved(built, forward(batch()), few, train=False))
    run.add(group, "decode", interleaved(built, Decode(), 12 * run.rounds, train=False, warm=4))
    if model == SMOLLM2:
        pair = {name: built[name] for name in (LORA, MIXLORA)}
        run.add(
            group,
            "lm-eval",
            interleaved(pair, LmEval(load_tokenizer(ModelSource(DEMO_MODEL))), run.rounds, train=False),
        )
    built = {name: build(base) for name, build in (LINEAR_METHODS | SHARING_METHODS).items()}
    run.add(group, "step", interleaved(built, step(batch()), run.rounds, train=True))
    if quick:
        return
    built = {name: build(base) for name, build in OTHERS.items()}
    run.add(group, "step", interleaved(built, step(batch()), few, train=True))
    run.add(group, "forward", interleaved(built, forward(batch()), few, train=False))
    # X-LoRA runs every token through two whole forwards and keeps no cache that decoding could use
    built = {name: value for name, value in built.items() if "X-LoRA" not in name}
    run.add(group, "decode", interleaved(built, Decode(), 4 * run.rounds, train=False, warm=4))


def start(run: Run) -> None:
    """What comes before the second step: an import in a new process, and the first step of a new model."""
    imports: dict[str, list[float]] = {IMPORT_PEFT: [], IMPORT_MOELORA: []}
    for index in range(run.rounds + 1):
        for name, seconds in imports.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, "-W", "ignore", "-c", name], check=True, capture_output=True)
            if index:  # the first reads the files from the disk
                seconds.append(time.perf_counter() - started)
    run.add(NEW_PROCESS, "import", imports)
    base = models.load_base(SMOLLM2, torch.bfloat16)
    built = {LORA: models.lora(base), MIXLORA: models.moelora(base, "mixlora", lora_dropout=0.05)}
    steps = interleaved(built, step(batch()), 4, train=True, warm=0)
    run.add((SMOLLM2, "bf16"), FIRST, {name: seconds[:1] for name, seconds in steps.items()})
    run.add((SMOLLM2, "bf16"), NEXT, {name: seconds[1:] for name, seconds in steps.items()})


def curves(run: Run) -> None:
    """How a step of one Llama layer grows with tokens, experts, choices and rank."""
    base = models.load_base(SLICE, torch.bfloat16, num_hidden_layers=1, vocab_size=1000)

    def at(metric: str, value: int, tokens: int = 1024, **words: Any) -> None:
        built = {LORA: models.lora(base, words.get("r", RANK)), MIXLORA: models.moelora(base, "mixlora", **words)}
        inputs = {key: ids % 1000 for key, ids in batch(tokens).items()}
        seconds = interleaved(built, step(inputs), max(2, run.rounds // 2), train=True)
        run.add(("one layer", "bf16"), f"{metric}={value}", seconds)

    for tokens in (256, 512, 1024, 2048, 4096, 8192):
        at("tokens", tokens, tokens)
    for experts in (4, 8, 16, 32, 64):
        at("experts", experts, num_experts=experts)
    for top_k in (1, 2, 3, 4):
        at("top_k", top_k, top_k=top_k)
    for rank in (4, 8, 16, 32, 64):
        at("rank", rank, r=rank, lora_alpha=2 * rank)


def build_for_memory(model: str, method: str) -> Any:
    """A model in the process that measures it."""
    torch.set_num_threads(2)
    base = models.load_base(model, torch.bfloat16)
    return models.lora(base) if method == LORA else models.moelora(base, "mixlora", compiled=method == COMPILED)


def memory(run: Run) -> None:
    """Peak memory of a training step, in small pages: memory that is not used does not count then."""
    os.environ.pop(HUGE_PAGES[0], None)
    for model in (SMOLLM2, SLICE):
        for method in (LORA, MIXLORA, COMPILED):
            grown = peak_memory(partial(build_for_memory, model, method), batch())
            if grown is not None:
                row = {"model": model, "dtype": "bf16", "metric": "memory", "method": method, "median": grown}
                run.rows.append({**row, "q1": grown, "q3": grown, "n": 1})
                print(f"  {model:13s} bf16 memory   {method:38s} {grown / 2**20:9.0f} MiB", flush=True)
