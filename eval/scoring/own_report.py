"""What an evaluation leaves behind: metrics.json for programs, report.md for people."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.scoring.heatmaps import RoutingMap
from eval.scoring.own_tables import WITHOUT_ANSWERS, chosen_rows, loss_rows, loss_title, notes, score_rows
from eval.scoring.own_tasks import OwnResults, TaskResult
from eval.scoring.scores import card_row, macro, mean
from eval.scoring.sources import Contestant
from moelora.files import write_atomically
from moelora.runs.tables import markdown
from moelora.runs.wording import commit_words

EXAMPLES = 2
_PROBLEMS = (
    "Share of fresh problems that reasoning-gym's verifier accepts, in percent, ± standard error. `majority` is what a "
    "model scores that always gives the most frequent answer; no problem occurs in the training rows. The verifiers "
    "want the bare answer that the prompt asks for, so a part of what training gains is the form."
)
_ROWS = (
    "Share of the rows whose answer the model gives letter for letter, white space around it left out, in percent, "
    "± standard error. `majority` is what a model scores that always gives the most frequent answer. Where many "
    "answers are as good, look at the loss."
)
_TEXTS = f"Loss of the tokens of texts. {WITHOUT_ANSWERS}"


def metrics(
    results: OwnResults,
    contestants: Sequence[Contestant],
    routing: RoutingMap | None,
    receipt: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything that was measured; `scores` is the list that a model card is made of."""
    metric = "exact" if results.has_answers else "loss"
    values = [(task, task.exact if results.has_answers else task.losses.__getitem__) for task in results.tasks]
    scores = []
    for task, of_model in values:
        for model in results.models:
            scores.append(card_row(task.task, metric, model, mean(of_model(model))))
            if not task.examples:
                scores.append(card_row(task.task, "verifier score", model, mean(task.scores[model])))
    for model in results.models:
        score = macro([mean(of_model(model)) for _, of_model in values])
        scores.append(card_row("mean of tasks", metric, model, score))
    found: dict[str, Any] = {
        "suite": "rows" if results.has_losses else "reasoning",
        "scores": scores,
        "tasks": {
            task.task: {
                "n": len(task.problems),
                "majority": None if task.majority is None else round(task.majority, 6),
                "dropped": task.dropped,
            }
            for task in results.tasks
        },
        "models": {contestant.name: _model(contestant, results) for contestant in contestants},
    }
    if routing is not None:
        found["routing"] = {
            **routing.to_json(),
            "distance": {
                task: dict(zip(routing.tasks, row.round(4).tolist(), strict=True))
                for task, row in zip(routing.tasks, routing.distances(), strict=True)
            },
            "distance_between_halves": dict(zip(routing.tasks, routing.noise.round(4).tolist(), strict=True)),
        }
    if results.has_losses:
        found["losses"] = {
            task.task: {
                model: {"value": round(loss.value, 6), "stderr": round(loss.stderr, 6), "n": loss.n}
                for model, loss in ((model, mean(task.losses[model])) for model in results.models)
            }
            for task in results.tasks
        }
    if results.chosen:
        found["chosen"] = results.chosen
    found["receipt"] = dict(receipt)
    return found


def _model(contestant: Contestant, results: OwnResults) -> dict[str, Any]:
    training = contestant.training or {}
    kept = ("preset", "trainable_parameters", "base_parameters", "steps", "seconds", "resumed_from")
    return {
        "role": contestant.role,
        "training": {key: training[key] for key in kept if key in training} or None,
        "evaluation_seconds": round(results.seconds[contestant.name], 1),
    }


def write_metrics(found: Mapping[str, Any], results_dir: Path, contestants: Sequence[Contestant]) -> Path:
    """Write metrics.json, and a copy beside the adapter, where `moelora push` looks for it."""
    file = results_dir / "metrics.json"
    write_atomically(file, json.dumps(found, indent=1) + "\n")
    for contestant in contestants:
        if contestant.role == "adapter" and contestant.adapter and Path(contestant.adapter).is_dir():
            copy = Path(contestant.adapter) / "metrics.json"
            if copy.resolve() != file.resolve():
                shutil.copyfile(file, copy)
    return file


def write_report(
    results: OwnResults,
    contestants: Sequence[Contestant],
    routing: RoutingMap | None,
    pictures: Sequence[Path],
    found: Mapping[str, Any],
    results_dir: Path,
) -> Path:
    """Write report.md, with the pictures beside it."""
    ours = contestants[-1]
    receipt = found["receipt"]
    sections = [
        f"# {ours.name} on {receipt['config']['model']}",
        (_ROWS if results.has_answers else _TEXTS) if results.has_losses else _PROBLEMS,
        markdown(*score_rows(results)) if results.has_answers else "",
        f"{loss_title(results)}.\n\n{markdown(*loss_rows(results))}" if results.has_losses else "",
        *notes(results),
        _comparison(contestants, receipt),
    ]
    if routing is not None:
        sections += _routing(routing, pictures, results_dir)
    if results.chosen:
        sections += ["## Which expert answers", markdown(*chosen_rows(results))]
    if results.has_answers:
        sections += ["## What they answer", *(_examples(task, results.models) for task in results.tasks)]
    sections.append(_receipt(receipt))
    file = results_dir / "report.md"
    write_atomically(file, "\n\n".join(filter(None, sections)) + "\n")
    return file


def _comparison(contestants: Sequence[Contestant], receipt: Mapping[str, Any]) -> str:
    trained = [contestant for contestant in contestants if contestant.training]
    if not trained:
        return ""
    training = {**receipt["config"]["training"]}
    changes = (receipt["config"].get("baseline") or {}).get("training") or {}
    rows = []
    for contestant in trained:
        record = contestant.training or {}
        words = {**training, **(changes if contestant.role == "baseline" else {})}
        rows.append(
            [
                contestant.name,
                f"{record['trainable_parameters']:,}",
                str(record["steps"]),
                str(words.get("learning_rate", "default")),
                f"{record['seconds']:.0f}" + (" (resumed)" if record.get("resumed_from") else ""),
            ]
        )
    return "## How they were trained\n\nOn the same rows in the same order, with the same seed.\n\n" + markdown(
        ["model", "trainable parameters", "steps", "learning rate", "seconds"], rows
    )


def _routing(routing: RoutingMap, pictures: Sequence[Path], results_dir: Path) -> list[str]:
    distances = routing.distances()
    rows = []
    for i, task in enumerate(routing.tasks):
        cells = [
            f"({100 * routing.noise[i]:.1f})" if i == j else f"{100 * distances[i, j]:.1f}"
            for j in range(len(distances))
        ]
        rows.append([task, *cells])
    return [
        "## Who goes where",
        "How differently two tasks use the experts: the percentage of choices that would have to move, mean over the "
        "layers. In brackets, two halves of the same task's questions: what chance alone makes of it.",
        markdown(["", *routing.tasks], rows),
        "Counted over the tokens of the questions; what the chat template adds to all of them alike is left out.",
        *(f"![{picture.stem}]({picture.relative_to(results_dir).as_posix()})" for picture in pictures),
    ]


def _examples(task: TaskResult, models: Sequence[str]) -> str:
    lines = [f"### {task.task}", ""]
    for index, problem in enumerate(task.problems[:EXAMPLES]):
        lines += ["```text", problem.prompt, "```", "", f"- reference: `{_code(problem.answer)}`"]
        for model in models:
            mark = "right" if task.scores[model][index] >= 1.0 else "wrong"
            lines.append(f"- {model}: `{_code(task.answers[model][index])}` ({mark})")
        lines.append("")
    return "\n".join(lines).rstrip()


def _code(text: str) -> str:
    """A text that fits between backticks on one line."""
    return text.replace("`", "'").replace("\n", " ⏎ ")[:200] or " "


def _receipt(receipt: Mapping[str, Any]) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in receipt["packages"].items())
    machine = receipt["machine"]
    return (
        "## Receipt\n\n"
        f"- made by: `{receipt['command']}`, {receipt['finished']}, {receipt['wall_seconds']:.0f} s\n"
        f"- code: {commit_words(receipt['git'])}\n"
        f"- seeds: {', '.join(f'{name} {seed}' for name, seed in receipt['seeds'].items())}\n"
        f"- packages: {packages}\n"
        f"- machine: {machine['processor']}, {machine['cores']} cores, {machine['threads']} threads"
        f"{', ' + machine['accelerator'] if machine['accelerator'] else ''}\n"
        "- the whole configuration is in metrics.json"
    )
