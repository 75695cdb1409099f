"""Score a run on problems of its own tasks: fresh ones of reasoning-gym, rows kept from training, or rows of files."""

from __future__ import annotations

import dataclasses
import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.receipt import make_receipt
from eval.scoring import heatmaps, own_report, own_tables, own_tasks
from eval.scoring.own_tasks import TaskResult
from eval.scoring.routing import as_json
from eval.scoring.sources import Contestant, beside, distinct, find_contestants, find_suite_models, run_on_rows
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.config import RunConfig
from moelora.runs.data import load_rows, task_names
from moelora.runs.folder import STAGES, RunDir
from moelora.runs.models import load_tokenizer
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
) -> dict[str, Any]:
    """Score a run or an adapter and write metrics.json, report.md and the pictures.

    They lie in the folder of the run or adapter; with `data` in its `results`, in a folder named as the first file.

    Args:
        source: As on the command line of `moelora eval`.
        config_file: As there.
        limit: As there.
        batch_size: As there.
        data: Files of rows to score on, as `--data`; none for the run's own problems.
        model: As there.
        others: Adapters to put beside, as `--beside`.

    Returns:
        What metrics.json has.

    Raises:
        RunError: If there is nothing to evaluate, or no way to.
    """
    started = time.monotonic()
    if data:
        trained, contestants, place = find_suite_models(source, config_file, model)
        config = run_on_rows(trained, source, data)
        folder = place / "results" / Path(data[0]).stem
    elif model is not None:
        raise RunError(f"--model {model!r} is given without --data; leave it out: the configuration names the model.")
    else:
        trained, contestants, folder = find_contestants(source, config_file)
        config = trained
    contestants = distinct([*contestants[:-1], *map(_beside, others), contestants[-1]])
    tokenizer = load_tokenizer(config)
    tasks = _tasks(config, trained, tokenizer, limit)
    results = own_tasks.run(config, contestants, tasks, tokenizer, batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    routing = heatmaps.RoutingMap.of(results.routing) if results.routing else None
    pictures = heatmaps.draw(routing, contestants[-1].name, folder / "heatmaps") if routing else []
    if routing:
        write_atomically(folder / "routing.json", json.dumps(as_json(routing, results.views)) + "\n")
    words = [("--config", config_file), ("--data", ",".join(data)), ("--model", model), ("--limit", limit)]
    words += [("--batch-size", batch_size), *(("--beside", other) for other in others)]
    receipt = make_receipt(
        config=dataclasses.asdict(config),
        seeds={
            "training": config.training.get("seed", 42),
            "training rows": config.dataset.seed,
            "evaluation problems": config.evaluation.seed,
        },
        seconds=time.monotonic() - started,
        command=shlex.join(["moelora", "eval", source, *(str(w) for pair in words if pair[1] for w in pair)]),
    )
    found = own_report.metrics(results, contestants, routing, receipt)
    metrics_file = own_report.write_metrics(found, folder, [] if data else contestants)
    report_file = own_report.write_report(results, contestants, routing, pictures, found, folder)

    print("\nExact answers in percent, ± standard error\n")
    print(terminal(*own_tables.score_rows(results)))
    if results.has_losses:
        print("\nLoss of an answer's token in nats, ± standard error; less is better\n")
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
    return found


def evaluate_stages(source: str, limit: int | None = None, batch_size: int | None = None) -> None:
    """Score the adapter after each task of a sequential run but the last, which is the run's own, as `evaluate` does.

    Args:
        source: Folder of the run.
        limit: As in `evaluate`.
        batch_size: As there.

    Raises:
        RunError: If it has no stages.
    """
    run = RunDir(source)
    stages = sorted((run.root / STAGES).glob("[0-9]*-*"), key=lambda stage: int(stage.name.split("-")[0]))
    if not run.config_file.is_file() or not stages:
        raise RunError(f"{source!r} has no stages; allowed with --stages: the folder of a run of recipe sequential.")
    for stage in stages[:-1]:
        print(f"\nAfter {stage.name}", flush=True)
        evaluate(str(stage), str(run.config_file), limit, batch_size)


def _beside(word: str) -> Contestant:
    """An adapter to compare with.

    Raises:
        RunError: For a file of results, which are of lm-eval's tasks.
    """
    if word.endswith(".json"):
        raise RunError(f"--beside {word!r} is a file of results; allowed without --suite: adapters.")
    return beside(word)


def _tasks(config: RunConfig, trained: Any, tokenizer: Any, limit: int | None) -> list[TaskResult]:
    """The problems.

    Raises:
        RunError: If there are none.
    """
    if config.dataset.tasks or not (config.dataset.held_out or config is not trained):
        return own_tasks.make_problems(config, tokenizer, limit)
    rows = load_rows(config.dataset, tokenizer, config.recipe, held_out=config.dataset.held_out > 0)
    numbers: list[str] = []
    if isinstance(trained, RunConfig):
        numbers = task_names(load_rows(trained.dataset, tokenizer, trained.recipe), trained.dataset)
    return own_tasks.problems_of_rows(rows, tokenizer, numbers, limit)
