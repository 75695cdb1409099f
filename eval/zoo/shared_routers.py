"""One router for linears of the same input beside one for each linear: what it saves, and whether it learns as well."""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from eval.speed.measure import interleaved
from eval.zoo.bases import base_of
from eval.zoo.cell import Bench, Trained, Wishes, config_of, lora_config, total_rank
from eval.zoo.report import write_page
from moelora.runs.tables import markdown

PRESETS = ("molora", "sira", "smora")
"""Those that have the word `routers`."""

SEEDS = (0, 1)
PLACEMENTS = ("per_site", "per_input")


def measure_shared(preset: str, seed: int, wishes: Wishes, say: Callable[[str], None]) -> dict[str, Any]:
    """Train a preset with either placement of its routers, and time both steps beside a LoRA of equal rank.

    Args:
        preset: Its name.
        seed: Of the adapter's weights and the order of the rows.
        wishes: How.
        say: Prints a line.

    Returns:
        What the page shows of it.
    """
    kind = base_of(preset)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(kind, wishes, folder)
        models, losses = {}, {}
        for routers in PLACEMENTS:
            config = config_of(preset, kind, routers=routers)
            models[routers] = Trained(bench, config, seed=seed)
            models[routers].trainer.train()
            losses[routers] = round(models[routers].loss(), 4)
            say(f"{routers}: loss {losses[routers]:.3f}")
        rank = total_rank(models["per_site"].model)
        assert rank is not None
        models["lora"] = bench.ready(lora_config(kind, rank, 0.0))
        rows = models["lora"].batch()
        seconds = interleaved(models, lambda each: each.step(rows), wishes.rounds, train=True, clock=time.process_time)
    return {
        "preset": preset,
        "seed": seed,
        "rank": rank,
        "losses": losses,
        "trainable": {name: models[name].model.get_nb_trainable_parameters()[0] for name in PLACEMENTS},
        "step_seconds": {name: [round(each, 4) for each in calls] for name, calls in seconds.items()},
    }


def write_shared(output: Path, cells: Sequence[dict[str, Any]], missing: Sequence[str]) -> str:
    """Write the page; its text.

    Args:
        output: Its folder.
        cells: What was found of each preset and seed.
        missing: Cells that were not done yet.
    """
    header = ["preset", "trainable", "with shared", "step / LoRA", "with shared", "seed", "loss", "with shared"]
    wishes = cells[0]["wishes"]
    text = (
        "A router for each linear, as the papers have it and the presets by default, beside `routers=per_input`: one "
        "for queries, keys and values and one for gate and up. SmolLM2-135M-Instruct in bfloat16, each preset at its "
        "defaults but for that. Step: forward and backward in the trainer, CPU time of one thread, "
        f"{wishes['rounds']} of each in turns, ratio of medians to a LoRA of the rank of all experts together. Loss: "
        f"of held-out rows, without balance losses, after {wishes['steps']} steps of 8 rows of the quickstart's four "
        f"tasks at one learning rate, {wishes['learning_rate']:g}. That is a short run without tuning: it would show a "
        "method that no longer learns, and no small difference."
    )
    return write_page(
        output / "shared_routers.md",
        title="One router for linears of the same input",
        missing=missing,
        undone="done",
        table=markdown(header, [_row(found) for found in cells]),
        text=text,
        cells=cells,
    )


def _row(found: dict[str, Any]) -> list[str]:
    medians = {name: statistics.median(calls) for name, calls in found["step_seconds"].items()}
    return [
        f"`{found['preset']}`",
        *(f"{found['trainable'][routers]:,}" for routers in PLACEMENTS),
        *(f"{medians[routers] / medians['lora']:.2f}" for routers in PLACEMENTS),
        str(found["seed"]),
        *(f"{found['losses'][routers]:.3f}" for routers in PLACEMENTS),
    ]
