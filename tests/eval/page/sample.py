"""The folder of a run as `moelora train` and `moelora eval` leave it, written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

LAYERS = [f"model.layers.{layer}.{kind}" for layer in range(3) for kind in ("self_attn.q_proj", "mlp")]
TASKS = ("sums", "names")
# What the page reads of an adapter_config.json, and how the page says it.
ADAPTER = {
    "preset": "mixlora",
    "peft_type": "MOELORA",
    "format_version": 2,
    "experts": {"kind": "lora", "num_experts": 4, "r": 2},
    "selection": {"kind": "top_k", "k": 2},
}
VERSION_1: dict[str, Any] = {"preset": "mixlora", "peft_type": "MOELORA", "format_version": 1}
ADAPTERS: list[tuple[dict[str, Any], list[str] | None]] = [
    (ADAPTER, ["experts", "4 of rank 2, top 2 per token"]),
    (ADAPTER | {"selection": {"kind": "dense"}}, ["experts", "4 of rank 2, all, weighted per token"]),
    (ADAPTER | {"selection": {"kind": "learned_threshold"}}, ["experts", "4 of rank 2, learned threshold per token"]),
    (
        VERSION_1 | {"experts": {"num_experts": 4, "r": 2}, "routing": {"top_k": 2}},
        ["experts", "4 of rank 2, top 2 per token"],
    ),
    (
        VERSION_1 | {"experts": {"num_experts": 4, "r": 2}, "routing": {"top_k": None}},
        ["experts", "4 of rank 2, all, weighted per token"],
    ),
    ({"peft_type": "LORA", "r": 7}, ["rank", "7"]),
    ({"peft_type": "MOELORA", "format_version": 2}, None),
]


def routing(experts: int = 4) -> dict[str, Any]:
    """A routing.json: the first task prefers low experts, the second high ones, and one expert is dead."""

    def load(task: int, layer: int) -> list[float]:
        weights = [float(1 + (expert if task else experts - expert) + layer) for expert in range(experts)]
        weights[1] = 0.0
        return [round(weight / sum(weights), 4) for weight in weights]

    tokens = ["What", " is", " <b>2</b>", " + 2", "?", "\n", "</script>", " é"]
    return {
        "tasks": dict.fromkeys(TASKS, 1234),
        "layers": LAYERS,
        "load": {task: [load(index, layer) for layer in range(len(LAYERS))] for index, task in enumerate(TASKS)},
        "statistics": {
            "experts": experts,
            "entropy": {"mean": 0.79, "layers": {layer: 0.5 + 0.08 * i for i, layer in enumerate(LAYERS)}},
            "dead": {"sum": 2, "layers": {layer: int(i < 2) for i, layer in enumerate(LAYERS)}},
            "similarity": {a: {b: 1.0 if a == b else 0.61 for b in TASKS} for a in TASKS},
            "chance": dict.fromkeys(TASKS, 0.97),
        },
        "texts": [
            {
                "task": task,
                "tokens": tokens,
                "experts": [[(layer + place + index) % experts for place in range(len(tokens))] for layer in range(6)],
                "weights": [[50 + place for place in range(len(tokens))] for _ in range(6)],
            }
            for index, task in enumerate(TASKS)
        ],
    }


def metrics() -> dict[str, Any]:
    """A metrics.json with a score at its floor."""
    scores = [
        {"task": task, "metric": "exact", "model": model, "value": value, "stderr": 0.05, "n": 60}
        for task, values in (("sums", (0.1, 0.45)), ("names", (0.3, 0.6)), ("mean of tasks", (0.2, 0.525)))
        for model, value in zip(("base", "MixLoRA"), values, strict=True)
    ]
    return {
        "scores": scores,
        "tasks": {"sums": {"n": 60, "majority": 0.1}, "names": {"n": 60, "majority": 0.25}},
        "receipt": {
            "command": "moelora eval runs/x",
            "finished": "2026-11-22T05:00:00+00:00",
            "git": {"commit": "0123456789abcdef", "dirty": True},
            "machine": {"processor": "a processor", "cores": 2},
            "packages": {"torch": "2.13.0"},
        },
    }


def training(parameters: int) -> dict[str, Any]:
    """A training.json with a falling loss."""
    log = [
        {"step": 5 * i, "loss": 3 / i, "token_accuracy": 0.1 * i, "balance_loss": 1 + 1 / i, "expert_load/entropy": 0.9}
        for i in range(1, 9)
    ]
    return {
        "trainable_parameters": parameters,
        "base_parameters": 1_000_000,
        "steps": 40,
        "seconds": 90.0,
        "resumed_from": None,
        "log": log,
    }


def write_run(folder: Path, adapter: dict[str, Any] = ADAPTER) -> Path:
    """A run's folder with everything in it."""
    files = {
        "adapter/adapter_config.json": adapter,
        "adapter/training.json": training(50_000),
        "baseline/training.json": training(50_400),
        "metrics.json": metrics(),
        "routing.json": routing(),
        "results/commonsense-loglik/metrics.json": {**metrics(), "protocol": "loglik"},
        "results/commonsense-loglik/routing.json": routing(6),
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    (folder / "config.yaml").write_text("model: owner/tiny-base\ntraining: {learning_rate: 0.001}\n")
    return folder


def stage_metrics(sums: float, names: float, role: str = "adapter") -> dict[str, Any]:
    """A metrics.json of an evaluation of the run's own tasks, of a base that scores 0.1 and 0.25 and one model."""
    return {
        "scores": [
            {"task": task, "metric": metric, "model": model, "value": value, "stderr": 0.05, "n": 60}
            for model, values in (("base", (0.1, 0.25)), ("ours", (sums, names)))
            for task, value in zip(TASKS, values, strict=True)
            for metric in ("verifier score", "exact")
        ],
        "tasks": {"sums": {"n": 60, "majority": 0.1}, "names": {"n": 60, "majority": 0.25}},
        "models": {"base": {"role": "base"}, "ours": {"role": role}},
    }


def write_sequential(folder: Path) -> Path:
    """A run of two tasks in turn, of which the first was forgotten in part; the last stage is scored as the run."""
    write_run(folder, ADAPTER | {"experts": {"kind": "lora_composed", "num_experts": 2, "r": 2, "names": list(TASKS)}})
    chosen = {"sums": {"sums": 45, "names": 12, "base model": 3}, "names": {"sums": 0, "names": 60, "base model": 0}}
    files = {
        "stages/1-sums/metrics.json": stage_metrics(0.6, 0.2),
        "stages/2-names/training.json": training(100),
        "metrics.json": stage_metrics(0.45, 0.7) | {"chosen": chosen},
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(content))
    return folder
