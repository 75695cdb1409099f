"""`python -m eval.speed --device cuda`: the benchmark on one GPU. It has never been run on one.

The methods and the turns they take are those of the CPU's benchmark. Here time is read after the device has done all
that it was given, and memory from torch's allocator; a test runs the rest on a CPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from eval.receipt import make_receipt
from eval.speed import models
from eval.speed.measure import Decode, Work, batch, forward, interleaved, step
from eval.speed.models import BESIDE, LINEAR_METHODS, LORA, MIXLORA, OTHERS, SMOLLM2, Builder
from eval.speed.report import write_gpu_report
from eval.speed.run import PARITY, Run, check_parity
from moelora.files import write_atomically

SLICE_8B = "Llama-3-8B slice"
SIZES = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 4,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
"""Of the random base that is timed: four layers of Llama-3-8B."""

TOKENS = (1024, 4096, 16384)
LENGTH = 1024
DECODED = (1, 32)
"""Tokens of a step or a forward, in sequences of `LENGTH`; sequences that are decoded at once."""


@dataclass(frozen=True)
class Meter:
    """How time and memory are read on a device.

    Attributes:
        device: The device, as torch calls it.
        name: What it is.
        clock: Seconds, once everything is done that the device was given.
        start: Bytes in use; the peak starts again from here.
        peak: The most bytes in use since then.
    """

    device: str
    name: str
    clock: Callable[[], float]
    start: Callable[[], int]
    peak: Callable[[], int]


def cuda_meter() -> Meter:
    """That of the first CUDA device.

    Raises:
        SystemExit: If there is none.
    """
    if not torch.cuda.is_available():
        raise SystemExit("--device is 'cuda', and torch finds no CUDA device here; allowed: --device cpu, or a GPU.")

    def clock() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    def start() -> int:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    return Meter("cuda", torch.cuda.get_device_name(), clock, start, torch.cuda.max_memory_allocated)


def methods(base: str) -> dict[str, Builder]:
    """Methods by name; the packages of others only on a base that is not quantised."""
    ours: dict[str, Builder] = {LORA: models.lora, MIXLORA: lambda base: models.moelora(base, "mixlora")}
    others = {name: build for name, build in OTHERS.items() if name != BESIDE}
    return ours | LINEAR_METHODS | (others if base == "bf16" else {})


def check_gradients(found: Run, base: Any) -> None:
    """Compare our gradients with those of our plain reference.

    Raises:
        SystemExit: If they differ; nothing is reported then.
    """
    error = models.gradient_error(base)
    found.parity["gradients"] = error
    if not error <= PARITY:
        raise SystemExit(
            f"the gradients of our MixLoRA differ from those of its reference by {error:.2g}; allowed: {PARITY}. No "
            "timing is reported."
        )


def memory(found: Run, group: tuple[str, str], metric: str, built: dict[str, Any], work: Work, meter: Meter) -> None:
    """Bytes that two steps need beside the loaded model; a method for which they are too many is dropped."""
    for name, model in list(built.items()):
        model.train()
        row = {"model": group[0], "dtype": group[1], "metric": metric, "method": name}
        before = meter.start()
        try:
            work(model)
            work(model)
        except torch.OutOfMemoryError:
            del built[name]
            found.rows.append({**row, "median": None})
            print(f"  {metric}: {name} does not fit", flush=True)
            continue
        found.rows.append({**row, "median": meter.peak() - before})


def compare(found: Run, base: Any, dtype: str, meter: Meter) -> None:
    """All methods on one base."""
    group = (SLICE_8B, dtype)
    built = {name: build(base) for name, build in methods(dtype).items()}

    def turns(metric: str, taking: Mapping[str, Any], work: Work, rounds: int, train: bool) -> None:
        found.add(group, metric, interleaved(taking, work, rounds, train=train, warm=2, clock=meter.clock))

    # decoding first: what does not fit into a long step can still decode
    for rows in DECODED:
        # X-LoRA runs every token through two whole forwards and keeps no cache that decoding could use
        decoding = {name: model for name, model in built.items() if "X-LoRA" not in name}
        prompts = batch(32 * rows, 32, meter.device)["input_ids"]
        turns(f"decode, batch {rows}", decoding, Decode(prompts), 4 * found.rounds, False)
    for tokens in TOKENS:
        inputs = batch(tokens, LENGTH, meter.device)
        memory(found, group, f"memory, {tokens} tokens", built, step(inputs), meter)
        turns(f"step, {tokens} tokens", built, step(inputs), found.rounds, True)
        turns(f"forward, {tokens} tokens", built, forward(inputs), found.rounds, False)


def run(output: Path, rounds: int, meter: Meter) -> None:
    """Check parity, measure, and write the report.

    Raises:
        SystemExit: If parity fails; nothing is reported then.
    """
    started, found = time.time(), Run(rounds, [], {})
    print("parity, in fp32", flush=True)
    check_gradients(found, check_parity(found, SMOLLM2, meter.device))
    for dtype in ("bf16", "nf4"):
        print(f"{SLICE_8B}, {dtype}", flush=True)
        base = models.load_base(SLICE_8B, torch.bfloat16, **SIZES).to(meter.device)
        compare(found, models.in_nf4(base) if dtype == "nf4" else base, dtype, meter)
    config = {"device": meter.name, "rounds": rounds, "tokens": TOKENS, "length": LENGTH, "decoded": DECODED, **SIZES}
    receipt = make_receipt(
        config=config,
        seeds={"weights": 0},
        seconds=time.time() - started,
        command="python -m eval.speed --device cuda",
    )
    results = {"receipt": receipt, "parity": found.parity, "rows": found.rows}
    write_atomically(output / "gpu.json", json.dumps(results, indent=1) + "\n")
    print("\n" + write_gpu_report(results, output))
