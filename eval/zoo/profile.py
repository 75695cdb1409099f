"""Where the time of a preset's step goes beside a LoRA of equal rank, from torch.profiler."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from torch.autograd.profiler import record_function
from torch.autograd.profiler_util import FunctionEvent
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from eval.speed.profile import kind_of
from eval.zoo.bases import base_of
from eval.zoo.cell import Bench, Trained, Wishes, config_of, equal_size, lora_config, total_rank
from eval.zoo.report import write_page
from moelora.layers.base import MoeLoraLayer
from moelora.routing.decision import Routing
from moelora.runs.tables import markdown
from moelora.training.metrics import RoutingMetrics
from moelora.training.micro_batch import MicroBatchBalance
from moelora.training.trainer import MoeLoraTrainerMixin

PRODUCTS, OTHERS, PYTHON = "matrix products", "other operations", "Python"
SCORES, SELECTION, BALANCE = "router: scores", "router: selection", "balance loss"
PARTS = (PRODUCTS, OTHERS, PYTHON, SCORES, SELECTION, BALANCE)
"""What a step's time is divided into; the first three are what is left outside of the last three."""

_BACKWARD = "autograd::engine::evaluate_function: "


def measure_parts(preset: str, wishes: Wishes, say: Callable[[str], None]) -> dict[str, Any]:
    """Profile a preset's step and that of a LoRA of equal rank in turns.

    Where experts are no low-rank factors, the LoRA is one of equal size.

    Args:
        preset: Its name.
        wishes: How many rounds, and of which rows.
        say: Prints a line.

    Returns:
        What the page shows of it.
    """
    kind, config = base_of(preset), config_of(preset, base_of(preset))
    dropout = getattr(config.experts, "lora_dropout", 0.0)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kind, wishes, folder)
        ours = bench.ready(config)
        trainable = ours.model.get_nb_trainable_parameters()[0]
        rank = total_rank(ours.model) or equal_size(bench.base, kind, trainable, dropout)
        models = {"ours": ours, "lora": bench.ready(lora_config(kind, rank, dropout))}
        rows = ours.batch()
        flops = {name: _flops(each, rows) for name, each in models.items()}
        rounds = [{name: parts_of_step(each, rows) for name, each in models.items()} for _ in range(wishes.rounds)]
    parts = {
        name: {part: round(statistics.median(each[name][part] for each in rounds), 2) for part in PARTS}
        for name in models
    }
    ours_ms, lora_ms = (sum(parts[name].values()) for name in models)
    say(f"{ours_ms:.0f} ms a step, LoRA r={rank} {lora_ms:.0f} ms")
    return {"preset": preset, "base": kind.name, "rank": rank, "flops": flops, "milliseconds": parts}


def _flops(trained: Trained, rows: Mapping[str, Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        trained.step(rows)
    return int(counter.get_total_flops())


def parts_of_step(trained: Trained, rows: Mapping[str, Any]) -> dict[str, float]:
    """Milliseconds of a step by part."""
    trained.train(True)
    with labelled(trained), profile(activities=[ProfilerActivity.CPU]) as profiler, record_function(PYTHON):
        trained.step(rows)
    return divide(profiler.events() or [])


@contextmanager
def labelled(trained: Trained) -> Iterator[None]:
    """While it lasts, the profiler sees what routers and balance losses do under the names of their parts."""
    config = trained.model.active_peft_config
    owners: list[tuple[Any, str, str]] = [
        (Routing, "gates_TE", SELECTION),
        (MoeLoraLayer, "report_routing", BALANCE),
        (MicroBatchBalance, "add_to", BALANCE),
        (RoutingMetrics, "add", BALANCE),
        (MoeLoraTrainerMixin, "_moelora_compare", BALANCE),
    ]
    if hasattr(config, "scores"):
        scores, selection = type(config.scores), type(config.selection)
        owners += [(scores, "prepare", SCORES), (scores, "score", SCORES), (selection, "select", SELECTION)]
    with ExitStack() as stack:
        for owner, name, label in owners:
            stack.enter_context(mock.patch.object(owner, name, _under(label, getattr(owner, name))))
        yield


def _under(label: str, function: Callable[..., Any]) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with record_function(label):
            return function(*args, **kwargs)

    return recorded


def divide(events: Sequence[FunctionEvent]) -> dict[str, float]:
    """Milliseconds of a profiled step by part.

    An operation of the backward pass belongs to the part whose forward it is of: both have the same sequence number.
    """
    total = dict.fromkeys(PARTS, 0.0)
    part_of_forward: dict[int, str | None] = {}
    left: list[tuple[FunctionEvent, str | None, bool]] = [
        (event, None, False) for event in sorted(events, key=_start, reverse=True) if event.cpu_parent is None
    ]
    while left:  # in the order of time, so that a forward is seen before its backward
        event, part, is_backward = left.pop()
        if event.name.startswith(_BACKWARD):
            part, is_backward = part_of_forward.get(event.sequence_nr), True
        elif part is None and event.name in (SCORES, SELECTION, BALANCE):
            part = event.name
        if not is_backward and event.sequence_nr >= 0:
            part_of_forward.setdefault(event.sequence_nr, part)
        total[part or _rest(event.name)] += event.self_cpu_time_total / 1e3
        left += [(child, part, is_backward) for child in sorted(event.cpu_children, key=_start, reverse=True)]
    return total


def _start(event: FunctionEvent) -> float:
    return float(event.time_range.start)


def _rest(name: str) -> str:
    if kind_of(name) == "matrix products":
        return PRODUCTS
    return OTHERS if name.startswith("aten::") else PYTHON


def write_profile(output: Path, profiles: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    """Write the page; its text.

    Args:
        output: Its folder.
        profiles: What was found of each preset.
        missing: Presets that were not profiled yet.
    """
    header = ["preset", "LoRA", "step / LoRA", "FLOPs / LoRA", *(f"+ {part}" for part in PARTS)]
    text = (
        "Each preset beside a LoRA of the rank of all its experts together, in turns, in the trainer; where experts "
        "are no low-rank factors the LoRA is one of equal size. A column with a + says what a part of the step takes "
        "more than in the LoRA's, in percent of the LoRA's whole step, so that 1 and the sum of a row are the ratio of "
        "the steps. Forward and backward together: the backward of an operation counts where its forward does. "
        "*Router: scores* and *selection* are all that leads to the gates; *balance loss* has the load, the biases "
        "that move and the metrics too. Outside of those, *matrix products* are of the base and the experts, *other "
        "operations* element-wise ones, dropout, casts, copies and sums, *Python* all that is no operation: modules, "
        "autograd and dispatch. FLOPs are those of matrix products, counted. The profiler makes many small operations "
        "look slower than they are: the ratio of steps to go by is that of [the table](README.md), in CPU time without "
        "it."
    )
    return write_page(
        output / "profile.md",
        title="Where the time of a step goes",
        missing=missing,
        undone="profiled",
        table=markdown(header, [_row(found) for found in profiles]),
        text=text,
        cells=profiles,
    )


def _row(found: dict[str, Any]) -> list[str]:
    ours, lora = (found["milliseconds"][name] for name in ("ours", "lora"))
    whole = sum(lora.values())
    return [
        f"`{found['preset']}`",
        f"r = {found['rank']}, {whole:.0f} ms",
        f"{sum(ours.values()) / whole:.2f}",
        f"{found['flops']['ours'] / found['flops']['lora']:.2f}",
        *(f"{(ours[part] - lora[part]) / whole:+.1%}" for part in PARTS),
    ]
