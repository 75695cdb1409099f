"""What a run's folder holds, in the form that the page shows.

The files are those of `moelora train` (`config.yaml`, `<stage>/training.json`), `moelora eval` (`metrics.json`
and `routing.json`, in the folder itself and in `results/<suite>`; `metrics.json` in `stages/<number>-<task>` of a
sequential run) and `moelora diagnose` (`diagnosis.json`); each may be missing.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from eval.page.compositions import read_compositions
from eval.page.diagnosis import read_diagnosis
from eval.page.forgetting import read_forgetting
from eval.scoring.judging import is_at_floor
from moelora.errors import ReportError
from moelora.runs.wording import commit_words

Json = dict[str, Any]
# A verifier's partial points are not a share of right answers, so that the floor says nothing about them.
_WITHOUT_FLOOR = ("verifier score",)
_CURVES = (
    ("loss", "loss", "lower is better"),
    ("token_accuracy", "accuracy of answer tokens", "share of labels that were the likeliest token"),
    ("balance_loss", "balance loss", "1.0 is perfect balance"),
    ("expert_load/entropy", "entropy of the load", "1.0 is perfect balance, mean of the layers"),
    ("expert_load/busiest", "busiest expert", "share of the choices, mean of the layers"),
    ("expert_load/dead", "dead experts", "experts without a token, sum of the layers"),
)


def read_run(run: Path) -> Json:
    """Everything that the page shows.

    Args:
        run: Folder of a run or of an adapter.

    Returns:
        `title`, `facts`, `runs` (None: it is one), `diagnosis`, `evaluations`, `compositions`, `forgetting`, `curves`,
        `routing`, `receipt` and `missing`, in plain types.

    Raises:
        ReportError: If the folder is not there or holds neither an adapter nor results.
    """
    if not run.is_dir():
        raise ReportError(f"{str(run)!r} is not a folder. Give the folder of a run, such as runs/quickstart.")
    adapter = run if (run / "adapter_config.json").is_file() else run / "adapter"
    config = _yaml(run / "config.yaml")
    words = _json(adapter / "adapter_config.json")
    stages = {name: _json(run / name / "training.json") for name in ("adapter", "baseline")}
    if adapter == run:
        stages["adapter"] = _json(run / "training.json")
    measured = list(_found(run, "metrics.json"))
    evaluations = [_evaluation(name, content) for name, content in measured]
    routing = [_routing(name, content) for name, content in _found(run, "routing.json")]
    training = {name: record for name, record in stages.items() if record}
    diagnosis = read_diagnosis(_json(run / "diagnosis.json"))
    if not (words or evaluations or routing or training or diagnosis):
        raise ReportError(
            f"{str(run)!r} holds nothing to report: no adapter, no training.json, no metrics.json, no routing.json and "
            "no diagnosis.json. Give the folder of a run that `moelora train` and `moelora eval`, or `moelora "
            "diagnose`, have written."
        )
    forgetting, unscored = read_forgetting(run, _json(run / "metrics.json"), _json)
    alone = diagnosis is not None and not (words or evaluations or routing or training)
    return {
        "title": _title({"preset": "Diagnosis"} if alone else words, config),
        "facts": [] if alone else _facts(words, config, training),
        "runs": None,
        "diagnosis": diagnosis,
        "evaluations": evaluations,
        "compositions": read_compositions(measured, routing, words),
        "forgetting": forgetting,
        "curves": _curves(training),
        "routing": routing,
        "receipt": _receipt(run),
        "missing": [] if alone else [*_missing(evaluations, training, routing), *unscored],
    }


def _json(file: Path) -> Json:
    """A file's mapping, or an empty one if the file is not there.

    Raises:
        ReportError: If it is not JSON.
    """
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ReportError(f"{str(file)!r} is not JSON ({error}); make it again, or remove it.") from error
    return content if isinstance(content, dict) else {}


def _yaml(file: Path) -> Json:
    if not file.is_file():
        return {}
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise ReportError(f"{str(file)!r} is not YAML ({error}); make it again, or remove it.") from error
    return content if isinstance(content, dict) else {}


def _found(run: Path, name: str) -> Iterable[tuple[str, Json]]:
    """The files of a name with what they are about: the run's own first."""
    own = _json(run / name)
    if own:
        yield "tasks of the run", own
    for file in sorted((run / "results").glob(f"*/{name}")):
        content = _json(file)
        if content:
            yield file.parent.name, content


def _title(words: Json, config: Json) -> str:
    name = words.get("preset") or (words.get("peft_type") and str(words["peft_type"])) or "Adapter"
    base = config.get("model") or words.get("base_model_name_or_path")
    return f"{name} on {Path(str(base)).name}" if base else str(name)


def _facts(words: Json, config: Json, training: Mapping[str, Json]) -> list[list[str]]:
    facts = []
    if experts := _experts(words):
        facts.append(["experts", experts])
    elif "r" in words:
        facts.append(["rank", str(words["r"])])
    record = training.get("adapter", {})
    if "trainable_parameters" in record:
        share = record["trainable_parameters"] / record["base_parameters"]
        facts.append(["trainable parameters", f"{record['trainable_parameters']:,} ({share:.1%} of the base)"])
    if "baseline" in training:
        facts.append(["LoRA beside it", f"{training['baseline']['trainable_parameters']:,} trainable parameters"])
    if "steps" in record:
        facts.append(["steps", str(record["steps"])])
    rate = (config.get("training") or {}).get("learning_rate", record.get("learning_rate"))
    if rate is not None:
        facts.append(["learning rate", f"{float(rate):g}"])
    if "seconds" in record:
        resumed = " since it was resumed" if record.get("resumed_from") else ""
        facts.append(["training time", f"{record['seconds'] / 60:.1f} min{resumed}"])
    return facts


def _experts(words: Json) -> str | None:
    """How many experts there are and which work on a token; reads parts of a configuration, of any format version."""
    # version 1 has one part for scores and selection, without a kind; there no top_k is dense selection
    experts, selection = words.get("experts"), words.get("selection", words.get("routing"))
    if not isinstance(experts, dict) or not isinstance(selection, dict):
        return None
    chosen, kind = selection.get("k", selection.get("top_k")), selection.get("kind", "dense")
    if chosen is not None:
        active = f"top {chosen}"
    else:
        active = "all, weighted" if kind == "dense" else str(kind).replace("_", " ")
    return f"{experts.get('num_experts')} of rank {experts.get('r')}, {active} per token"


def _evaluation(name: str, content: Json) -> Json:
    """A table of scores: one row per task and metric, one column per model; losses have one of their own."""
    scores = [row for row in content.get("scores", []) if {"task", "metric", "value"} <= row.keys()]
    models = list(dict.fromkeys(str(row.get("model", "value")) for row in scores))
    scores = [row for row in scores if row["metric"] != "loss"]
    tasks = content.get("tasks") or {}
    rows: dict[tuple[str, str], Json] = {}
    for row in scores:
        key = str(row["task"]), str(row["metric"])
        floor = None if row["metric"] in _WITHOUT_FLOOR else tasks.get(row["task"], {}).get("majority")
        line = rows.setdefault(key, {"task": key[0], "metric": key[1], "n": row.get("n"), "floor": floor, "cells": {}})
        at_floor = is_at_floor(row["value"], floor)
        line["cells"][str(row.get("model", "value"))] = {
            "value": row["value"],
            "stderr": row.get("stderr"),
            "at_floor": at_floor,
        }
    return {
        "name": name,
        "protocol": content.get("protocol"),
        "models": models,
        "rows": list(rows.values()),
        "losses": content.get("losses") or {},
        "any_floor": any(cell["at_floor"] for row in rows.values() for cell in row["cells"].values()),
    }


def _curves(training: Mapping[str, Json]) -> list[Json]:
    """Series over the steps, for each value that some stage has logged."""
    curves = []
    for key, title, note in _CURVES:
        series = []
        for stage, record in training.items():
            points = [
                [entry["step"], entry[key]] for entry in record.get("log", []) if key in entry and "step" in entry
            ]
            if len(points) > 1:
                series.append({"name": stage, "points": points})
        if series:
            curves.append({"title": title, "note": note, "series": series})
    return curves


def _routing(name: str, content: Json) -> Json:
    """What `routing.json` holds, with the kinds of modules that the routers sit on."""
    try:
        kinds: dict[str, list[int]] = {}
        for index, layer in enumerate(content["layers"]):
            kinds.setdefault(_kind(layer), []).append(index)
        return {
            "name": name,
            "tasks": content["tasks"],
            "layers": content["layers"],
            "kinds": kinds,
            "load": content["load"],
            "statistics": content["statistics"],
            "texts": content["texts"],
        }
    except (KeyError, TypeError) as error:
        raise ReportError(f"routing.json of {name!r} lacks {error}; let `moelora eval` write it again.") from error


def _kind(layer: str) -> str:
    """A module's name after the number of its decoder layer."""
    parts = layer.split(".")
    last = max((index for index, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[last + 1 :]) or layer


def _receipt(run: Path) -> Json:
    """Of the first evaluation that has one, or of a diagnosis."""
    for _, content in [*_found(run, "metrics.json"), ("diagnosis", _json(run / "diagnosis.json"))]:
        receipt = content.get("receipt")
        if isinstance(receipt, dict):
            shown = {key: receipt[key] for key in ("command", "finished", "packages", "machine") if key in receipt}
            return shown | ({"code": commit_words(receipt["git"])} if "git" in receipt else {})
    return {}


def _missing(evaluations: list[Json], training: Mapping[str, Json], routing: list[Json]) -> list[str]:
    """What the page could show and the folder does not have."""
    missing = []
    if not evaluations:
        missing.append("No scores yet: `moelora eval RUN --suite commonsense` makes them.")
    if "adapter" not in training:
        missing.append("No training curves: the folder has no training.json of the adapter.")
    if not routing:
        missing.append("No routing: the adapter has no routers, or `moelora eval` has not analysed it yet.")
    return missing
