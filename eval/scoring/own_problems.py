"""Score a run on problems of its own tasks: fresh ones of reasoning-gym, rows kept from training, or rows of files."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.receipt import make_receipt
from eval.scoring import heatmaps, own_report, own_tables, own_tasks
from eval.scoring.own_tasks import OwnResults, TaskResult
from eval.scoring.routing import as_json
from eval.scoring.sources import (
    Contestant,
    beside,
    distinct,
    find_contestants,
    find_suite_models,
    run_on_rows,
    with_overrides,
)
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.config import RunConfig
from moelora.runs.data import load_rows, task_names
from moelora.runs.folder import ADAPTER, STAGES, RunDir, read_task_stage
from moelora.runs.held_out import prompt_key
from moelora.runs.models import ModelSource, load_tokenizer
from moelora.runs.tables import terminal
from moelora.runs.wording import minutes


def evaluate(
    source: str,
    config_file: str | None = None,
    limit: int | None = None,
    batch_size: int | None = None,
    *,
    data: Sequence[str] = (),
    model: str | None = None,
    others: Sequence[str] = (),
    overrides: Sequence[str] = (),
    stages: bool = False,
) -> dict[str, Any]:
    """Score a run or an adapter and write metrics.json, report.md and the pictures.

    They lie in the folder of the run or adapter; with `data` in its `results`, in a folder named as the files; of a
    stage in the folder of the stage.

    Args:
        source: As on the command line of `moelora eval`.
        config_file: As there.
        limit: As there.
        batch_size: As there.
        data: Files of rows to score on, as `--data`; none for the run's own problems.
        model: As there.
        others: Adapters to put beside, as `--beside`.
        overrides: `key=value` of `evaluation`, and with `data` of `dataset`.
        stages: Score the adapter after each task of a sequential run first. The last stage is the run's own adapter.

    Returns:
        What metrics.json has.

    Raises:
        RunError: If there is nothing to evaluate, or no way to.
    """
    earlier = None
    for stage in _stages(source) if stages else []:
        print(f"\nAfter {stage.name}", flush=True)
        run_file = str(RunDir(source).config_file)
        _, earlier = _evaluate(str(stage), run_file, limit, batch_size, overrides=overrides, earlier=earlier)
    words: dict[str, Any] = {"data": data, "model": model, "others": others, "overrides": overrides}
    return _evaluate(source, config_file, limit, batch_size, **words, earlier=earlier)[0]


def _evaluate(
    source: str,
    config_file: str | None,
    limit: int | None,
    batch_size: int | None,
    *,
    data: Sequence[str] = (),
    model: str | None = None,
    others: Sequence[str] = (),
    overrides: Sequence[str] = (),
    earlier: OwnResults | None,
) -> tuple[dict[str, Any], OwnResults]:
    """As `evaluate`, of one adapter; the base model is not scored again if that was done for another stage."""
    started = time.monotonic()
    trained: RunConfig | ModelSource
    if data:
        trained, contestants, place = find_suite_models(source, config_file, model)
        config = with_overrides(run_on_rows(trained, source, data), overrides, ("evaluation", "dataset"))
        names = "-".join(Path(file).stem for file in data)
        folder = place / "results" / f"rows-{re.sub(r'[^A-Za-z0-9_.-]+', '-', names)}"
    elif model is not None:
        raise RunError(f"--model {model!r} is given without --data; leave it out: the configuration names the model.")
    else:
        found_config, contestants, folder = find_contestants(source, config_file)
        trained = config = with_overrides(found_config, overrides, ("evaluation",))
    contestants = distinct([contestants[0], *map(_beside, others), *contestants[1:]])
    tokenizer = load_tokenizer(config)
    tasks = _tasks(config, trained, RunDir(Path(config_file).parent if config_file else source), tokenizer, limit)
    results = own_tasks.run(config, contestants, tasks, tokenizer, batch_size, earlier)
    folder.mkdir(parents=True, exist_ok=True)
    routing = heatmaps.RoutingMap.of(results.routing) if results.routing else None
    pictures = heatmaps.draw(routing, contestants[-1].name, folder / "heatmaps") if routing else []
    if routing:
        write_atomically(folder / "routing.json", json.dumps(as_json(routing, results.views)) + "\n")
    words = [("--config", config_file), ("--data", ",".join(data)), ("--model", model), ("--limit", limit)]
    words += [("--batch-size", batch_size), *(("--beside", other) for other in others)]
    receipt = make_receipt(
        config=dataclasses.asdict(config),
        seeds=_seeds(trained),
        seconds=time.monotonic() - started,
        command=shlex.join(
            ["moelora", "eval", source, *(str(w) for pair in words if pair[1] for w in pair), *overrides]
        ),
    )
    found = own_report.metrics(results, contestants, routing, receipt)
    # beside the adapter, for its card, are the scores that the run itself asks for
    metrics_file = own_report.write_metrics(found, folder, [] if data or others else contestants)
    report_file = own_report.write_report(results, contestants, routing, pictures, found, folder)

    if results.has_answers:
        print("\nExact answers in percent, ± standard error\n")
        print(terminal(*own_tables.score_rows(results)))
    if results.has_losses:
        print(f"\n{own_tables.loss_title(results)}\n")
        print(terminal(*own_tables.loss_rows(results)))
    if results.chosen:
        print("\nWhich expert answers\n")
        print(terminal(*own_tables.chosen_rows(results), foot=0))
    lines = ["", *own_tables.notes(results), "", f"report    {report_file}", f"metrics   {metrics_file}"]
    if pictures:
        lines.append(f"pictures  {pictures[0].parent}")
    adapter = contestants[-1].adapter
    lines += [f"adapter   {adapter}", f"\nEvaluated in {minutes(time.monotonic() - started)}. To share the adapter:"]
    lines += [f"  moelora push {adapter} YOUR_NAME/YOUR_ADAPTER", "To look at scores, curves and routing in a browser:"]
    print("\n".join([*lines, f"  moelora report {place if data else folder}"]), flush=True)
    return found, results


def _seeds(trained: RunConfig | ModelSource) -> dict[str, int]:
    """What was random: nothing that is known of an adapter without a run."""
    if not isinstance(trained, RunConfig):
        return {}
    seeds = {"training": trained.training.get("seed", 42), "training rows": trained.dataset.seed}
    return seeds | ({"evaluation problems": trained.evaluation.seed} if trained.dataset.tasks else {})


def _stages(source: str) -> list[Path]:
    """The adapter after each task of a sequential run but the last, which is the run's own.

    Args:
        source: Folder of the run.

    Raises:
        RunError: If it has no stages.
    """
    run = RunDir(source)
    found = {folder: read_task_stage(folder.name) for folder in (run.root / STAGES).glob("*")}
    numbers = {stage[1]: folder for folder, stage in found.items() if stage and stage[0] == ADAPTER}
    stages = [folder for _, folder in sorted(numbers.items())]
    if not run.config_file.is_file() or not stages:
        raise RunError(f"{source!r} has no stages; allowed with --stages: the folder of a run of recipe sequential.")
    return stages[:-1]


def _beside(word: str) -> Contestant:
    """An adapter to compare with.

    Raises:
        RunError: For a file of results, which are of lm-eval's tasks.
    """
    if word.endswith(".json"):
        raise RunError(f"--beside {word!r} is a file of results; allowed without --suite: adapters.")
    return beside(word)


def _tasks(
    config: RunConfig, trained: RunConfig | ModelSource, run: RunDir, tokenizer: Any, limit: int | None
) -> list[TaskResult]:
    """The problems.

    Args:
        config: What to score on.
        trained: The run, or the base model of an adapter that has none.
        run: Where the run noted what it was trained on.
        tokenizer: Of the base model.
        limit: Problems per task; None takes all rows, and of reasoning-gym as many as the run says.

    Raises:
        RunError: If there are none, or the rows that were held out are not those that would be now.
    """
    is_own = config is trained
    if config.dataset.tasks or (is_own and not config.dataset.held_out):
        return own_tasks.make_problems(config, tokenizer, limit)
    rows = load_rows(config.dataset, tokenizer, config.recipe, held_out=is_own)
    numbers: list[str] = []
    longest: int | None = own_tasks.TEXT_LENGTH
    if isinstance(trained, RunConfig):
        longest = trained.training.get("max_length", longest)
        seen = load_rows(trained.dataset, tokenizer, trained.recipe)
        numbers = task_names(seen, trained.dataset)
        if is_own:
            run.check_rows_are(seen)
        else:
            keys = {prompt_key(row, 0) for row in seen}
            known = sum(prompt_key(row, 0) in keys for row in rows)
            if known:
                print(f"Note: the run was trained on the prompts of {known} of these {len(rows)} rows.", flush=True)
    return own_tasks.problems_of_rows(rows, tokenizer, numbers, limit, longest)
