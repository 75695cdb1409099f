"""`python -m eval.speed`: what a mixture costs beside a LoRA, in ratios of medians of one run.

Every group of methods is measured in turns (a call of each, again and again), so that a slow minute of the machine hits
all of them. Adapters have the base's data type. The authors' package must give our numbers before it is timed. On Linux
it starts itself again with glibc's memory in huge pages, for peers and ours alike: the page faults of small ones add
scatter of the size of what is to be measured.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import time
from pathlib import Path


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(prog="python -m eval.speed", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="LoRA and presets only, few rounds, about 5 minutes")
    parser.add_argument(
        "--count",
        action="store_true",
        help="no timing: launches, bytes kept, FLOPs on a GPU's path, 10 minutes",
    )
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cpu",
        help="cuda: steps, forwards, decoding and memory on one GPU, on bf16 and nf4, meant to take 10 minutes",
    )
    parser.add_argument("--rounds", type=int, help="timed calls of each method (7; quick: 3; cuda: 5)")
    parser.add_argument("--output", type=Path, help="folder of the report (eval/results/speed; quick: runs/speed)")
    options = parser.parse_args(arguments)
    # after the words are read, so that --help answers at once
    from eval.speed.measure import restart_in_huge_pages
    from moelora.runs.quiet import quiet_libraries

    if options.count:
        from eval.speed import count

        quiet_libraries()
        count.run(options.output or Path("eval/results/speed"))
        return
    if options.device == "cuda":
        from eval.speed import gpu

        quiet_libraries()
        gpu.run(options.output or Path("eval/results/speed"), options.rounds or 5, gpu.cuda_meter())
        return
    restart_in_huge_pages("eval.speed", arguments)
    quiet_libraries()
    run(options)


def run(options: argparse.Namespace) -> None:
    """Measure, and write the report."""
    from eval.receipt import make_receipt
    from eval.speed.measure import HUGE_PAGES
    from eval.speed.models import RANK, SLICE, SMOLLM2
    from eval.speed.report import write_report
    from eval.speed.run import Run, check_parity, compare, curves, memory, start
    from moelora.files import write_atomically

    output = options.output or Path("runs/speed" if options.quick else "eval/results/speed")
    rounds = options.rounds or (3 if options.quick else 7)
    tunables = os.environ.get(HUGE_PAGES[0])
    started = time.time()
    found = Run(rounds, [], {})
    groups = [(SMOLLM2, "bf16"), (SLICE, "bf16"), (SMOLLM2, "fp32"), (SLICE, "fp32")]
    print("parity, in fp32", flush=True)
    for model in (SMOLLM2, SLICE):
        check_parity(found, model)
    for model, dtype in groups[:2] if options.quick else groups:
        print(f"{model}, {dtype}", flush=True)
        compare(found, model, dtype, options.quick)
        gc.collect()
    if not options.quick:
        print("the start, growth of one layer, and memory", flush=True)
        start(found)
        curves(found)
        memory(found)
    config = {"rounds": rounds, "tokens": "8 x 128", "experts": 8, "top_k": 2, "r": RANK, "quick": options.quick}
    config["allocator"] = tunables
    command = "python -m eval.speed" + (" --quick" if options.quick else "")
    receipt = make_receipt(config=config, seeds={"weights": 0}, seconds=time.time() - started, command=command)
    results = {"receipt": receipt, "parity": found.parity, "rows": found.rows}
    write_atomically(output / "speed.json", json.dumps(results, indent=1) + "\n")
    print("\n" + write_report(results, output))


if __name__ == "__main__":
    main()
