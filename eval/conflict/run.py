"""The whole diagnosis: the plan and its cost, the arms, the verdict, and what is written."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import time
from pathlib import Path
from typing import Any

from eval.conflict import pictures, report
from eval.conflict import plan as planning
from eval.conflict.advice import ROUTER_ROWS, Place, expert_names
from eval.conflict.arms import CENTROID_ROWS, SCORES, Arms
from eval.conflict.plan import ARMS, Options, Plan, Timing
from eval.conflict.split import Split, split_rows
from eval.conflict.summary import DIAGNOSIS, summarize
from eval.receipt import make_receipt
from moelora.errors import RunError
from moelora.files import claimed, write_atomically
from moelora.runs.config import RunConfig, save_config
from moelora.runs.console import say
from moelora.runs.data import load_rows
from moelora.runs.folder import HARMLESS, STAGES, RunDir, changes, rows_digest, with_defaults
from moelora.runs.models import load_tokenizer
from moelora.runs.wording import minutes

PLAN = "plan.json"
# plan.json itself is replaced as it is written, and a lock would stay with the old file.
LOCK = ".lock"
# Of a configuration, what changes nothing here; the baseline's targets are in the plan.
_IGNORED = (*HARMLESS, "baseline", "recipe", "sequential")


def diagnose(
    config: RunConfig,
    options: Options,
    place: Place,
    *,
    command: str,
    plan_only: bool = False,
    restart: bool = False,
) -> dict[str, Any] | None:
    """Find out whether a run's tasks need a mixture, from where an earlier call was stopped.

    Args:
        config: The run whose tasks are looked at.
        options: The choices.
        place: The configuration's file, and where everything goes.
        command: How it was started.
        plan_only: Only say what would be trained and for how long; nothing is written.
        restart: Throw away what an earlier call has made.

    Returns:
        The diagnosis; None for `plan_only`.

    Raises:
        RunError: If the rows do not do, the folder is taken, or something that is needed is not installed.
    """
    _check_installed()
    if config.recipe not in ("sft", "sequential"):
        raise RunError(f"recipe is {config.recipe!r}; allowed: sft, sequential. A diagnosis trains on texts.")
    folder = RunDir(place.folder)
    _check_place(folder.root)
    tokenizer = load_tokenizer(config)
    rows = load_rows(config.dataset, tokenizer)
    split = split_rows(rows, options.held_out, config.dataset.seed)
    plan = planning.make_plan(config, split, options)
    _show(plan, split)
    shared_rows = next(iter(split.train.values()))
    if plan_only:
        known = Timing(folder.root).read()
        cost = planning.seconds_a_step(config, plan, shared_rows, tokenizer) if known is None else known
        _say_cost(plan, split, cost, folder)
        return None
    with claimed(folder.root / LOCK) as ours:
        if not ours:
            raise RunError(
                f"--out {str(folder.root)!r} is taken: another `moelora diagnose` is at it. Wait until it has ended, "
                "or give another --out."
            )
        _open(folder, config, plan, options, rows_digest(rows), restart=restart)
        file = folder.root / DIAGNOSIS
        if file.is_file():
            found: dict[str, Any] = json.loads(file.read_text())
            if found["margin"] == options.margin:
                say(f"\nThe diagnosis is there already: {file} (--restart makes it again)")
                return found
        timing = Timing(folder.root)
        step = timing.read()
        if step is None:
            step = planning.seconds_a_step(config, plan, shared_rows, tokenizer)
            timing.write(step)
        _say_cost(plan, split, step, folder)
        started = time.monotonic()
        arms = Arms(config, plan, split, folder, tokenizer)
        measured = arms.measure()
        found = summarize(measured, plan, split, options, config, place)
        found["receipt"] = make_receipt(
            config=dataclasses.asdict(config),
            seeds={"training": arms.seed, "rows": config.dataset.seed},
            seconds=time.monotonic() - started,
            command=command,
        )
        _write_router_rows(split, folder.root)
        pictures.draw(found, folder.root)
        write_atomically(folder.root / "README.md", report.readme(found))
        # the last thing: where this file is, everything is
        write_atomically(file, json.dumps(found, indent=1) + "\n")
        return found


def _check_installed() -> None:
    missing = [name for name in ("trl", "matplotlib") if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(
            f"a diagnosis trains with TRL and draws with matplotlib; not installed: {', '.join(missing)}. "
            "pip install trl matplotlib jinja2"
        )


def _check_place(root: Path) -> None:
    """Refuse a folder that has something else in it: README.md and config.yaml would be written over.

    Raises:
        RunError: If it has.
    """
    if root.exists() and not root.is_dir():
        raise RunError(f"--out {str(root)!r} is a file; give the name of a folder.")
    if (root / PLAN).is_file() or not root.is_dir():
        return
    if any(not path.name.startswith(".") for path in root.iterdir()):
        raise RunError(
            f"--out {str(root)!r} has something in it that is no diagnosis; give a folder of its own, such as "
            "runs/diagnose/mine."
        )


def _open(
    folder: RunDir, config: RunConfig, plan: Plan, options: Options, rows: dict[str, Any], *, restart: bool
) -> None:
    """Start in the folder, or resume what is there.

    Raises:
        RunError: If it holds a diagnosis of something else.
    """
    file = folder.root / PLAN
    given = {
        **dataclasses.asdict(config),
        "plan": plan.to_json(),
        "held_out": options.held_out,
        "rows": rows,
    }
    now = json.loads(json.dumps(given))
    if restart:
        for name in (DIAGNOSIS, SCORES, STAGES, "checkpoints", "probe.json"):
            path = folder.root / name
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
    elif file.is_file() and (changed := changes(_before(file), now, _IGNORED)):
        raise RunError(
            f"--out {str(folder.root)!r} holds a diagnosis of another configuration: {'; '.join(changed)}. Give "
            "another --out, undo the change, or --restart to throw the old one away."
        )
    write_atomically(file, json.dumps(now, indent=1) + "\n")
    save_config(config, folder.config_file)


def _before(file: Path) -> dict[str, Any]:
    """What a diagnosis was started with; keys of the configuration that came later are at their defaults."""
    before: dict[str, Any] = json.loads(file.read_text())
    own = {field.name for field in dataclasses.fields(RunConfig)} & before.keys()
    return {**before, **with_defaults({name: before[name] for name in own})}


def _show(plan: Plan, split: Split) -> None:
    sizes = [
        f"{task} {len(split.train[task])} + {len(split.selection[task])} + {len(split.scored[task])}"
        for task in plan.tasks
    ]
    say(f"Rows      {', '.join(sizes)} (to train, to choose learning rates, to score)")
    exact = plan.adapter_parameters / plan.rank_parameters
    near = "" if exact == plan.rank else f"; the adapter's size is that of rank {exact:.1f}"
    say(
        f"LoRAs     one of rank {plan.rank}, or {len(plan.tasks)} of rank {plan.part_rank}: "
        f"{plan.rank * plan.rank_parameters:,} trainable parameters each way{near}"
    )
    rates = ", ".join(f"{rate:g}" for rate in plan.rates.values())
    count = sum(len(plan.stages(arm, rate)) for arm in ARMS for rate in plan.rates)
    say(
        f"Plan      {count} trainings, {len(ARMS) * len(plan.rates) * plan.steps} steps in all: "
        f"{', '.join(ARMS)}, each {plan.steps} steps at the learning rates {rates}"
    )


def _say_cost(plan: Plan, split: Split, step: float, folder: RunDir) -> None:
    left = planning.seconds_left(plan, split, step, folder.is_finished)
    say(f"Cost      about {minutes(left)} ({step:.2f} s a step)")


def _write_router_rows(split: Split, root: Path) -> None:
    """Training rows with the names of the experts, for `moelora compose --data`."""
    names = expert_names(list(split.train))
    lines = [
        json.dumps({**row, "task": names[task]}, ensure_ascii=False)
        for task, rows in split.train.items()
        for row in rows.select(range(min(len(rows), CENTROID_ROWS)))
    ]
    write_atomically(root / ROUTER_ROWS, "\n".join(lines) + "\n")
