"""Score an adapter, its base and what it is compared with on a suite of lm-eval tasks."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from eval.receipt import make_receipt
from eval.scoring.model_scores import ModelScores
from eval.scoring.routing import analyse
from eval.scoring.scorer import Scorer
from eval.scoring.scores import card_row
from eval.scoring.sources import Contestant, beside, distinct, find_suite_models, read_adapter_config
from eval.scoring.suite_scores import score_suite, uses_chat
from eval.scoring.suite_tables import check_comparable, notes, score_table
from eval.suites.registry import Suite, load_suite
from moelora.errors import RunError
from moelora.files import write_atomically
from moelora.runs.config import RunConfig
from moelora.runs.console import say
from moelora.runs.models import ModelSource, load_skeleton, load_tokenizer
from moelora.runs.parameters import count_parameters
from moelora.runs.tables import markdown, terminal
from moelora.runs.wording import minutes

# Rows of each task whose routing is analysed.
ROUTING_ROWS = 48
# Rows at the foot of the table that are no tasks.
_FOOT = 4


def run_suite(
    source: str,
    *,
    suite: str,
    protocol: str | None = None,
    limit: int | None = None,
    config_file: str | None = None,
    model: str | None = None,
    beside: Sequence[str] = (),
    batch_size: int = 32,
) -> list[ModelScores]:
    """Score everything and write the results beside the run or the adapter.

    Args:
        source: Folder of a run, folder of an adapter, or an adapter's name on the Hub.
        suite: Name of a suite, or tasks.
        protocol: Protocol of the suite commonsense.
        limit: The first so many rows of each task; None for all.
        config_file: The run's YAML where `source` is an adapter.
        model: The base model where `source` is an adapter.
        beside: More adapters, or JSON files that an earlier call has written.
        batch_size: Rows at once.

    Raises:
        RunError: If there is nothing to evaluate, or results cannot be compared.
    """
    started = time.monotonic()
    base, contestants, folder = find_suite_models(source, config_file, model)
    earlier, others = _beside(beside)
    contestants = distinct([*contestants[:-1], *others, contestants[-1]])
    loaded = load_suite(suite, protocol)
    if earlier:  # what cannot be compared is said before the time is spent
        _check_protocol(earlier, loaded)
    results_dir = folder / "results" / slug(loaded)
    tokenizer = load_tokenizer(base)
    say(
        f"Suite     {loaded.name}, protocol {loaded.protocol}: {', '.join(map(loaded.label, loaded.tasks))}"
        f"{f', the first {limit} rows of each' if limit else ''}"
    )
    scores, model = [], None
    for each in others:
        each.load(base)  # one of another base is found before any time is spent
    for each in contestants:
        model = None  # the one before makes room first
        found, model = score_model(each, base, tokenizer, loaded, limit, batch_size)
        scores.append(found)
    if earlier:
        scores = [*scores[:-1], *earlier, scores[-1]]
    check_comparable(scores)
    _write(scores, results_dir)
    if scores[-1].kind not in ("base", "lora"):
        texts = min(limit or ROUTING_ROWS, ROUTING_ROWS)
        analyse(
            model, tokenizer, loaded, name=contestants[-1].name, rows=texts, batch_size=batch_size, folder=results_dir
        )
    header, rows = score_table(scores)
    print(f"\nScores in percent, ± standard error; protocol {loaded.protocol}\n")
    print(terminal(header, rows, foot=_FOOT))
    print("\n".join(["", *notes(scores), "", f"results   {results_dir}", f"a page    moelora report {folder}"]))
    print(f"\nScored in {minutes(time.monotonic() - started)}.", flush=True)
    return scores


def score_model(
    contestant: Contestant,
    base: RunConfig | ModelSource,
    tokenizer: Any,
    suite: Suite,
    limit: int | None,
    batch_size: int,
    *,
    short_logits: bool = False,
) -> tuple[ModelScores, Any]:
    """Load a model and score it, with a receipt; the scores and the model."""
    started = time.monotonic()
    config = read_adapter_config(contestant.adapter) if contestant.adapter else None
    model = contestant.load(base)
    scorer = Scorer(model, tokenizer, batch_size=batch_size, name=contestant.name, short_logits=short_logits)
    tasks, seconds, examples = score_suite(scorer, suite, limit)
    scores = ModelScores(
        name=contestant.name,
        suite=suite.name,
        protocol=suite.protocol,
        chat=uses_chat(scorer, suite),
        limit=limit,
        tasks=tasks,
        parameters=count_parameters(load_skeleton(base), config).to_json(),
        seconds=round(seconds, 2),
        tokens=scorer.tokens,
        kind=kind_of(config),
        adapter=contestant.adapter,
        receipt=make_receipt(
            config={"model": base.model, "dtype": base.dtype, "model_kwargs": base.model_kwargs, "batch": batch_size},
            seeds={},
            seconds=time.monotonic() - started,
            command=f"moelora eval {contestant.adapter or '...'} --suite {suite.name}"
            + (f" --protocol {suite.protocol}" if suite.name == "commonsense" else "")
            + (f" --limit {limit}" if limit else "")
            + f" --batch-size {batch_size}",
        ),
        extra={"examples": examples},
    )
    mean = scores.macro
    say(f"{contestant.name}  mean {100 * mean.value:.1f} ± {100 * mean.stderr:.1f}  {minutes(seconds)}")
    return scores, model


def kind_of(config: Any | None) -> str:
    """The preset of an adapter, "lora" for a plain one, "base" for none."""
    if config is None:
        return "base"
    peft_type = getattr(config.peft_type, "value", config.peft_type)
    return str(getattr(config, "preset", None) or peft_type).lower()


def _beside(words: Sequence[str]) -> tuple[list[ModelScores], list[Contestant]]:
    earlier, others = [], []
    for word in words:
        if word.endswith(".json"):
            earlier.append(ModelScores.read(Path(word)))
        else:
            others.append(beside(word))
    return earlier, others


def _check_protocol(earlier: Sequence[ModelScores], suite: Suite) -> None:
    for each in earlier:
        if (each.suite, each.protocol) != (suite.name, suite.protocol):
            raise RunError(
                f"{each.name} was scored on {each.suite!r} by the protocol {each.protocol!r}, which cannot stand in a "
                f"table of {suite.name!r} by {suite.protocol!r}: numbers of different protocols are not comparable."
            )


def slug(suite: Suite) -> str:
    """A folder's name for a suite and its protocol."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", f"{suite.name}-{suite.protocol}").strip("-")


def _write(scores: Sequence[ModelScores], folder: Path) -> None:
    """A JSON file a model, one of all in the form of a model card's metrics, and the table in Markdown."""
    for each in scores:
        each.write(folder / f"{re.sub(r'[^A-Za-z0-9_.=-]+', '-', each.name).strip('-')}.json")
    write_atomically(folder / "metrics.json", json.dumps(card_metrics(scores), indent=1) + "\n")
    table = markdown(*score_table(scores))
    heading = f"# {scores[0].suite}, protocol {scores[0].protocol}\n\nScores in percent, ± standard error."
    write_atomically(folder / "README.md", "\n\n".join([heading, table, *notes(scores)]) + "\n")


def card_metrics(scores: Sequence[ModelScores]) -> dict[str, Any]:
    """The rows that `moelora push --metrics` puts into a model card."""
    rows = []
    for each in scores:
        for label, task in each.tasks.items():
            rows.append(card_row(f"{label} ({each.protocol})", task.metric, each.name, task.score))
        rows.append(card_row(f"mean of tasks ({each.protocol})", "mean", each.name, each.macro))
    tasks = {
        f"{label} ({scores[0].protocol})": {"n": len(task.values), "majority": task.majority}
        for label, task in scores[0].tasks.items()
    }
    return {
        "suite": scores[0].suite,
        "protocol": scores[0].protocol,
        "scores": rows,
        "tasks": tasks,
        "receipt": scores[-1].receipt,
    }
