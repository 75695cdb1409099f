"""Everything that was found, as diagnosis.json holds it."""

from __future__ import annotations

import dataclasses
from statistics import fmean
from typing import Any

from eval.conflict.advice import Place, next_steps
from eval.conflict.arms import Found, answered
from eval.conflict.plan import ARMS, OWN, RANDOM, SHARED, Options, Plan
from eval.conflict.split import Split
from eval.conflict.verdict import TITLES, decide, transfer_share
from eval.scoring.scores import difference, macro
from moelora.runs.config import RunConfig

DIAGNOSIS = "diagnosis.json"


def summarize(
    found: Found,
    plan: Plan,
    split: Split,
    options: Options,
    config: RunConfig,
    place: Place,
) -> dict[str, Any]:
    """The diagnosis without its receipt.

    Args:
        found: What was measured.
        plan: The trainings.
        split: The rows.
        options: The choices.
        config: The run whose tasks were looked at.
        place: Where its file and this diagnosis are, for commands to go on with.
    """
    losses = {"base": found.base} | {arm: answered(arm, found.parts[arm], plan.tasks) for arm in ARMS}
    headroom = {task: difference(losses[SHARED][task], losses[OWN][task]) for task in plan.tasks}
    partition = {task: difference(losses[RANDOM][task], losses[SHARED][task]) for task in plan.tasks}
    means = {arm: {task: fmean(values[task]) for task in plan.tasks} for arm, values in losses.items()}
    of_own = {
        lora: {task: fmean(part[task]) for task in plan.tasks}
        for lora, part in zip(plan.tasks, found.parts[OWN], strict=True)
    }
    share = transfer_share(means["base"], of_own)
    shared_gain = fmean(means["base"].values()) - fmean(means[SHARED].values())
    verdict = decide(headroom, shared_gain, share, options.margin)
    return {
        "model": config.model,
        "verdict": {**verdict.to_json(), "title": TITLES[verdict.kind]},
        "next": next_steps(verdict, plan, found, config, place, options),
        "tasks": {
            task: {
                **{arm: means[arm][task] for arm in ("base", *ARMS)},
                "headroom": dataclasses.asdict(headroom[task]),
                "partition": dataclasses.asdict(partition[task]),
                "told_apart": found.told_apart[task],
                "rows": {use: len(getattr(split, use)[task]) for use in ("train", "selection", "scored")},
            }
            for task in plan.tasks
        },
        "mean": {
            **{arm: fmean(means[arm].values()) for arm in ("base", *ARMS)},
            "headroom": dataclasses.asdict(macro(list(headroom.values()))),
            "partition": dataclasses.asdict(macro(list(partition.values()))),
            "told_apart": fmean(found.told_apart.values()),
        },
        "transfer": {
            "share": share,
            "against_base": {
                lora: {task: of_own[lora][task] - means["base"][task] for task in plan.tasks} for lora in plan.tasks
            },
        },
        "conflict": found.conflict,
        "arms": {
            arm: {
                "rank": plan.rank if arm == SHARED else plan.part_rank,
                "loras": len(plan.steps_of(arm)),
                "steps": plan.steps,
                "learning_rate": plan.rates[found.rates[arm]],
                "factor": found.rates[arm],
                "selection": found.selection[arm],
            }
            for arm in ARMS
        },
        "trainable_parameters": plan.rank * plan.rank_parameters,
        "adapter_parameters": plan.adapter_parameters,
        "margin": options.margin,
        "held_out": options.held_out,
        "rows_dropped": split.dropped,
    }
