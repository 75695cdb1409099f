"""`python -m tests.long_runs`: what shows only after a long time, on tiny models.

Many steps of training: memory stays flat, steps do not slow down, every metric is finite. A long generation: nothing is
kept, and each token is the one that a single forward over all of them picks. Many adapters on one model: each gives
what it gave as the newest. Times are those of the CPU, so that other work beside does not count.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import psutil  # type: ignore[import-untyped]
import torch
from datasets import Dataset
from peft import get_peft_model
from transformers import PrinterCallback, TrainerCallback, TrainingArguments

from moelora import MoeLoraTrainer
from tests.adapters import adapter_tensors, shake, small_config
from tests.conftest import VOCAB, tiny_batch, tiny_model
from tests.reliability import write_section

_MB = 1e6
SLOWER = 1.5
"""How many times as long a step may take at the end."""


@dataclass(frozen=True)
class Found:
    """What came of a run.

    Args:
        what: What was done.
        found: What was measured, in words.
        wrong: What is not as it should be; empty if all is well.
    """

    what: str
    found: str
    wrong: tuple[str, ...]

    @classmethod
    def of(cls, what: str, found: str, **bars: bool) -> Found:
        """With the bars that were not met, by name."""
        return cls(what, found, tuple(name.replace("_", " ") for name, met in bars.items() if not met))


def memory() -> float:
    """Resident memory of this process in MB, garbage aside."""
    gc.collect()
    return float(psutil.Process().memory_info().rss) / _MB


class _Watch(TrainerCallback):
    """Notes time and memory every so many steps, and every metric."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.marks: list[tuple[float, float]] = []
        self.metrics: list[float] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.every == 0:
            self.marks.append((time.process_time(), memory()))

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.metrics += [float(value) for value in (logs or {}).values()]


def many_steps(steps: int) -> Found:
    """Train with balance losses, routing metrics and moving biases."""
    model = get_peft_model(tiny_model(num_hidden_layers=1), small_config("mixlora"))
    rows = torch.randint(3, VOCAB, (64, 9), generator=torch.Generator().manual_seed(0)).tolist()
    data = Dataset.from_list([{"input_ids": row, "labels": row, "attention_mask": [1] * 9} for row in rows])
    watch = _Watch(every=max(1, steps // 20))
    with tempfile.TemporaryDirectory(prefix="long-runs-") as folder:
        arguments = TrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=2,
            logging_steps=max(1, steps // 200),
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = MoeLoraTrainer(model=model, args=arguments, train_dataset=data, callbacks=[watch])
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    times, sizes = zip(*watch.marks, strict=True)
    per_step = [(after - before) / watch.every for before, after in itertools.pairwise(times)]
    quarter = max(1, len(per_step) // 4)
    early, late = 1e3 * median(per_step[:quarter]), 1e3 * median(per_step[-quarter:])
    # what the first twentieth allocates stays: caches of the allocator, and of Python
    growth = sizes[-1] - sizes[len(sizes) // 4]
    return Found.of(
        f"{steps:,} steps of training (mixlora on a tiny Llama)",
        f"{early:.1f} ms a step at first, {late:.1f} at the end; {growth:.1f} MB more memory than after the first "
        f"quarter; {sum(map(math.isfinite, watch.metrics)):,} of {len(watch.metrics):,} metrics finite",
        memory_is_flat=growth < 10,
        no_slow_down=late < SLOWER * early,
        metrics_are_finite=bool(watch.metrics) and all(map(math.isfinite, watch.metrics)),
        parameters_are_finite=all(bool(p.isfinite().all()) for p in model.parameters()),
    )


def long_generation(tokens: int) -> Found:
    """Generate greedily with a KV cache, and compare with one forward over everything."""
    model = get_peft_model(
        tiny_model(num_hidden_layers=1, max_position_embeddings=tokens + 16), small_config("mixlora")
    )
    shake(model)
    model.eval()
    ids = torch.randint(3, VOCAB, (1, 8), generator=torch.Generator().manual_seed(0))
    words: dict[str, Any] = {"do_sample": False, "eos_token_id": None}
    model.generate(input_ids=ids, max_new_tokens=8, **words)
    before, started = memory(), time.process_time()
    found = model.generate(input_ids=ids, max_new_tokens=tokens, **words)
    seconds, growth = time.process_time() - started, memory() - before
    with torch.no_grad():
        logits = model(input_ids=found[:, :-1]).logits[0, ids.shape[1] - 1 :]
    chosen = logits.gather(1, found[0, ids.shape[1] :, None])[:, 0]
    # two of nearly the same logit may change places by rounding
    others = int((chosen < logits.max(1).values - 1e-4).sum())
    return Found.of(
        f"{tokens:,} tokens generated (mixlora on a tiny Llama)",
        f"{1e3 * seconds / tokens:.1f} ms a token; {growth:.1f} MB more memory afterwards; {others} tokens that one "
        "forward over all of them would not pick",
        all_tokens_are_there=found.shape[1] == ids.shape[1] + tokens,
        tokens_are_those_of_one_forward=others == 0,
        nothing_is_kept=growth < 20,
    )


@torch.no_grad()
def many_adapters(count: int) -> Found:
    """Put many adapters on one model, use each alone and all in one batch, and delete them."""
    base = tiny_model()
    batch = {key: value for key, value in tiny_batch().items() if key != "labels"}
    expected = base(**batch).logits
    names = [f"adapter_{index}" for index in range(count)]
    model, alone, seconds = None, {}, []
    for index, name in enumerate(names):
        started = time.process_time()
        config = small_config("mixlora", num_experts=2 + index % 4)
        if model is None:
            model = get_peft_model(base, config, adapter_name=name)
        else:
            model.add_adapter(name, config)
        seconds.append(time.process_time() - started)
        for key, p in model.named_parameters():
            if f".{name}." in key:
                p.copy_(0.2 * torch.randn(p.shape, generator=torch.Generator().manual_seed(index)))
        model.eval().set_adapter(name)
        alone[name] = model(**batch).logits
    assert model is not None
    same = 0
    for name in names:
        model.set_adapter(name)
        same += torch.equal(model(**batch).logits, alone[name])
    row = {key: value[:1] for key, value in batch.items()}
    mixed = model(**{key: value.expand(count, -1) for key, value in row.items()}, adapter_names=names).logits
    close = sum(torch.allclose(mixed[i], alone[name][0], rtol=1e-4, atol=3e-5) for i, name in enumerate(names))
    for name in names[:-1]:
        model.delete_adapter(name)
    last = torch.equal(model(**batch).logits, alone[names[-1]])
    left = {key.split(".")[-2] for key in adapter_tensors(model)}
    quarter = max(1, count // 4)
    return Found.of(
        f"{count} adapters on one model (mixlora on a tiny Llama)",
        f"{1e3 * median(seconds[:quarter]):.0f} ms to add one at first, {1e3 * median(seconds[-quarter:]):.0f} at the "
        f"end; {same} of {count} give bit for bit what they gave as the newest; {close} of {count} rows of one batch",
        each_gives_what_it_gave=same == count,
        a_batch_of_all_gives_the_same=close == count,
        deleting_the_others_leaves_the_last=last and left == {names[-1]},
        unloading_gives_the_base=torch.equal(model.unload()(**batch).logits, expected),
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all; 1 if a bar is not met."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.long_runs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=10_000, help="of training (10000)")
    parser.add_argument("--tokens", type=int, default=8192, help="to generate (8192)")
    parser.add_argument("--adapters", type=int, default=64, help="on one model (64)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="the page that gets a section")
    options = parser.parse_args(arguments)
    found = []
    for run, size in (
        (many_adapters, options.adapters),
        (long_generation, options.tokens),
        (many_steps, options.steps),
    ):
        found.append(run(size))
        print(f"{found[-1].what}: {found[-1].found}", *found[-1].wrong, sep="\n  NOT: ", flush=True)
    if options.output is not None:
        rows = [f"| {each.what} | {each.found} | {'; '.join(each.wrong) or 'none'} |" for each in found]
        table = ["| run | found | bars not met |", "|---|---|---|", *rows]
        write_section(options.output, "Long runs", "make long-runs", table)
    return int(any(each.wrong for each in found))


if __name__ == "__main__":
    sys.exit(main())
