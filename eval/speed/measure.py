"""How the speed benchmark measures: every method in turn, round after round, so that all of them share the weather."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from moelora.routing.run import find_hooks
from moelora.runs.quiet import quiet_libraries
from moelora.training.micro_batch import MicroBatchBalance, active_config

Work = Callable[[Any], None]

HUGE_PAGES = ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1")
"""Environment variable of the timings; other C libraries ignore it."""


def restart_in_huge_pages(module: str, arguments: Sequence[str] | None) -> None:
    """Start the program again with memory in huge pages, unless the environment says something else about it.

    Args:
        module: The program, as in `python -m`.
        arguments: Those that `main` was called with; a program that is called by another is left alone.
    """
    if arguments is None and sys.platform == "linux" and HUGE_PAGES[0] not in os.environ:
        command = [sys.executable, "-m", module, *sys.argv[1:]]
        os.execve(sys.executable, command, {**os.environ, HUGE_PAGES[0]: HUGE_PAGES[1]})


@contextmanager
def one_thread() -> Iterator[None]:
    """A single thread for torch's operations, so that CPU seconds are those of the work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def batch(tokens: int = 1024, length: int = 128, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Token ids [tokens / length, length] with labels; nothing is padding."""
    generator = torch.Generator().manual_seed(0)
    rows, length = (tokens // length, length) if tokens >= length else (1, tokens)
    ids = torch.randint(10, 10000, (rows, length), generator=generator).to(device)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def step(inputs: Mapping[str, torch.Tensor]) -> Work:
    """Forward and backward with the balance losses that our trainers add; gradients are dropped as by `zero_grad`."""

    def loss_of(model: Any) -> torch.Tensor:
        hooks = find_hooks(model)
        config = None if hooks is None else active_config(model)
        if hooks is None or config is None:
            return model(**inputs).loss
        with hooks.listening(gradients_only=True) as listener:
            loss = model(**inputs).loss
        balance = MicroBatchBalance(
            listener, config.balance, config.balance_scope, hooks.mixtures(), layers=hooks.layers
        )
        return balance.add_to(loss, divided_later=False)

    def work(model: Any) -> None:
        loss_of(model).backward()
        for parameter in model.parameters():
            parameter.grad = None

    return work


def forward(inputs: Mapping[str, torch.Tensor]) -> Work:
    """A forward without gradients."""

    def work(model: Any) -> None:
        with torch.no_grad():
            model(**inputs)

    return work


class Decode:
    """One more token of each of a model's own sequences, with its KV cache, after prompts.

    Args:
        prompts: Their token ids [B, S]; one of 32 tokens by default.
    """

    def __init__(self, prompts: torch.Tensor | None = None) -> None:
        self.prompts = batch(32)["input_ids"] if prompts is None else prompts
        self.states: dict[int, tuple[Any, torch.Tensor]] = {}

    def __call__(self, model: Any) -> None:
        cache, token = self.states.get(id(model), (None, self.prompts))
        with torch.no_grad():
            output = model(input_ids=token, past_key_values=cache, use_cache=True)
        self.states[id(model)] = (output.past_key_values, output.logits[:, -1:].argmax(-1))


class LmEval:
    """lm-eval's log-likelihoods of sixteen answers of 16 tokens to prompts of 112, in batches of eight.

    Args:
        tokenizer: The model's.
        size: Token ids are below it.
    """

    def __init__(self, tokenizer: Any, size: int = 10_000) -> None:
        from lm_eval.api.instance import Instance

        self.tokenizer = tokenizer
        rows = batch(16 * 128)["input_ids"] % size
        texts = [(tokenizer.decode(ids[:112]), tokenizer.decode(ids[112:])) for ids in rows]
        self.requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(texts)]
        self.harness: dict[int, Any] = {}

    def __call__(self, model: Any) -> None:
        from lm_eval.models.huggingface import HFLM

        if id(model) not in self.harness:
            self.harness[id(model)] = HFLM(pretrained=model, tokenizer=self.tokenizer, batch_size=8)
        self.harness[id(model)].loglikelihood(self.requests, disable_tqdm=True)


def interleaved(
    models: Mapping[str, Any],
    work: Work,
    rounds: int,
    *,
    train: bool,
    warm: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each call by method.

    Args:
        models: Methods.
        work: What is timed.
        rounds: Calls of each.
        train: Whether the models are in training mode.
        warm: Calls before the first one that counts (compilation, memory).
        clock: Seconds; `time.process_time` with one thread is blind to the waiting that other programs cause.
    """
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for index in range(rounds + warm):
        for name, model in models.items():
            model.train(train)
            started = clock()
            work(model)
            if index >= warm:
                seconds[name].append(clock() - started)
    return seconds


def spread(seconds: list[float]) -> dict[str, Any]:
    """Median, quartiles and all calls, in seconds."""
    low, high = quartiles(seconds)
    calls = [round(value, 5) for value in seconds]
    return {"median": statistics.median(seconds), "q1": low, "q3": high, "n": len(seconds), "seconds": calls}


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """The first and the third."""
    low, _, high = statistics.quantiles(values, n=4) if len(values) > 1 else [values[0]] * 3
    return low, high


def peak_memory(
    build: Callable[[], Any],
    inputs: Mapping[str, torch.Tensor],
    work: Callable[[Mapping[str, torch.Tensor]], Work] = step,
) -> int | None:
    """Bytes by which two training steps raise a fresh process' peak above its loaded model; None where unknown.

    Args:
        build: Makes the model; a function that a new process can import.
        inputs: The batch.
        work: Makes the step of the batch; a function that a new process can import.
    """
    if not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_of_steps, args=(build, dict(inputs), work, sender))
    process.start()
    sender.close()
    try:
        grown = int(receiver.recv())
    except EOFError:
        raise RuntimeError(f"the process that measures the memory of {build} failed; its error is above") from None
    process.join()
    return grown


def _peak_of_steps(build: Callable[[], Any], inputs: dict[str, torch.Tensor], make_work: Any, sender: Any) -> None:
    quiet_libraries()
    model = build().train()
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _status("VmRSS")
    work = make_work(inputs)
    work(model)
    work(model)
    sender.send(_status("VmHWM") - before)


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))
