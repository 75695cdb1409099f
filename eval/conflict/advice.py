"""What to do after a diagnosis: commands that exist, with the names of what is there."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from eval.conflict.arms import Found
from eval.conflict.plan import OWN, SHARED, Options, Plan
from eval.conflict.split import SELECTION_SHARE
from eval.conflict.verdict import Verdict
from moelora.runs.config import RunConfig

ROUTER_ROWS = "router_rows.jsonl"
# The share of prompts that the nearest centroid has to send to their own task to be worth trying.
APART = 0.9


@dataclass(frozen=True)
class Place:
    """Where things are.

    Args:
        config: The configuration's file, and what was changed of it, as words of a command line.
        folder: Of the diagnosis.
    """

    config: tuple[str, ...]
    folder: Path


def expert_names(tasks: Sequence[str]) -> dict[str, str]:
    """A name for the expert of each task that a command line and a folder take as it is."""
    found: dict[str, str] = {}
    for task in tasks:
        name = plain = re.sub(r"[^A-Za-z0-9_-]+", "_", task).strip("_-") or "task"
        number = 1
        while name in found.values():
            number += 1
            name = f"{plain}_{number}"
        found[task] = name
    return found


def next_steps(
    verdict: Verdict, plan: Plan, found: Found, config: RunConfig, place: Place, options: Options
) -> list[dict[str, str]]:
    """Sentences, each with a command.

    Args:
        verdict: The verdict.
        plan: The trainings.
        found: What was measured.
        config: The run whose tasks were looked at.
        place: Where things are.
        options: The choices.
    """
    # a configuration may train its tasks one after the other; what is advised first is to train them at once
    recipe = [] if config.recipe == "sft" else ["--recipe", "sft"]
    train = ["moelora", "train", *place.config, *recipe]
    if verdict.kind == "lora":
        words = [*_lora(plan, SHARED, found), "baseline=null", f"output_dir={config.output_dir}-lora"]
        return [_step("Train one LoRA on all tasks", [*train, *words])]
    if verdict.kind == "undecided":
        if verdict.more_rows is None:
            return [_more_rates(place, options)]
        return [_more_rows(verdict.more_rows, found, config, place, options)]
    compose = _compose(plan, found, config, place.folder)
    if verdict.kind == "separate":
        # a task's name is the name of a folder there
        if not all(re.fullmatch(r"[A-Za-z0-9_][\w.-]*", task) for task in plan.tasks):
            return [compose]
        order = f"sequential={{order: {json.dumps(plan.tasks)}}}"
        in_turn = ["moelora", "train", *place.config, "--recipe", "sequential"]
        in_turn += [*_lora(plan, OWN, found), order, "baseline=null", f"output_dir={config.output_dir}-sequential"]
        return [compose, _step("Where tasks come one after the other, train an expert for each", in_turn)]
    preset = config.adapter["preset"]
    if preset in ("lora", "random_router"):
        preset, r = "mixlora", max(1, round(plan.rank / 8))
        train.append(f"adapter={{preset: mixlora, num_experts: 8, top_k: 2, {_size(plan, r)}}}")
        train.append(f"output_dir={config.output_dir}-mixlora")
    beside = "" if config.baseline is None else ", beside the LoRA of the configuration's section `baseline`"
    return [_step(f"Train a mixture ({preset}){beside}", train), compose]


def _lora(plan: Plan, arm: str, found: Found) -> list[str]:
    """A LoRA as the arm has trained it, at the learning rate that was the arm's best."""
    r = plan.rank if arm == SHARED else plan.part_rank
    words = f"preset: lora, {_size(plan, r)}, target_modules: {json.dumps(plan.target_modules)}"
    return [f"adapter={{{words}}}", f"training.learning_rate={plan.rates[found.rates[arm]]:g}"]


def _size(plan: Plan, r: int) -> str:
    dropout = f", lora_dropout: {plan.dropout:g}" if plan.dropout else ""
    return f"r: {r}, lora_alpha: {r * plan.scaling:g}{dropout}"


def _step(why: str, command: Sequence[str]) -> dict[str, str]:
    return {"why": why, "command": shlex.join(command)}


def _compose(plan: Plan, found: Found, config: RunConfig, folder: Path) -> dict[str, str]:
    names = expert_names(plan.tasks)
    stages = plan.stages(OWN, found.rates[OWN])
    loras = [f"{names[task]}={folder / stage}" for task, stage in zip(plan.tasks, stages, strict=True)]
    share = fmean(found.told_apart.values())
    if share >= APART:
        why = f"Compose the tasks' LoRAs, which are trained already; centroids send {share:.0%} of the prompts right"
        # without `unknown: false` a threshold sends some prompts to the base, which `told_apart` does not
        router = ["--router", "{kind: centroids, unknown: false}", "--data", str(folder / ROUTER_ROWS)]
    else:
        why = (
            "Compose the tasks' LoRAs, which are trained already, and say the task of each prompt yourself "
            f"(`task_ids`); centroids send only {share:.0%} of the prompts right"
        )
        router = ["--router", "task"]
    return _step(why, ["moelora", "compose", *loras, *router, "--base", config.model, "-o", str(folder / "composed")])


def _more_rates(place: Place, options: Options) -> dict[str, str]:
    """The diagnosis again on a wider grid of learning rates."""
    wider = dataclasses.replace(options, rates=(min(options.rates) / 2, *options.rates, 2 * max(options.rates)))
    return _step(
        "Look again at more learning rates; if own LoRAs are no better then either, train for more steps",
        ["moelora", "diagnose", *place.config, "--out", f"{place.folder}-rates", *wider.words()],
    )


def _more_rows(more: int, found: Found, config: RunConfig, place: Place, options: Options) -> dict[str, str]:
    """The diagnosis again on more rows."""
    scored = sum(len(values) for values in found.base.values())
    factor = 1 + more / scored
    again = ["moelora", "diagnose", *place.config]
    out = ["--out", f"{place.folder}-more", *options.words()]
    if config.dataset.tasks:
        rows = math.ceil(config.dataset.rows_per_task * factor)
        return _step("Look again with more rows", [*again, f"dataset.rows_per_task={rows}", *out])
    of_data = math.ceil(more / (options.held_out * (1 - SELECTION_SHARE)))
    if config.dataset.limit is not None:
        limit = config.dataset.limit + of_data
        return _step("Look again with more rows", [*again, f"dataset.limit={limit}", *out])
    return _step(
        f"Add about {of_data:,} rows to the data, so that {more:,} more are scored; then look again", again + out
    )
