"""Which experts the texts of each task go to: loads, how alike tasks are, and what single tokens do."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.scoring import heatmaps
from eval.scoring.generation import RoutingCounts
from eval.scoring.heatmaps import RoutingMap
from eval.suites.registry import Suite
from eval.suites.requests import right_request
from moelora import MoeLoraConfig, record_routing
from moelora.compose.tokens import batches
from moelora.files import write_atomically
from moelora.forward import without_logits
from moelora.progress import track
from moelora.runs.parameters import router_weights

# An expert with less than this share of what it would have in perfect balance is dead.
DEAD = 0.01
TEXTS_A_TASK = 2
TOKENS_A_TEXT = 120

Texts = Mapping[str, Sequence[Sequence[int]]]
"""Task to the token ids of its texts."""


@dataclass
class TokenView:
    """A text and, for each router, the expert that weighs most on each of its tokens.

    Args:
        task: Label of its task.
        tokens: The text's tokens as texts.
        experts: Name of a layer to an expert a token.
        weights: Name of a layer to that expert's weight in percent a token.
    """

    task: str
    tokens: list[str]
    experts: dict[str, list[int]] = field(default_factory=dict)
    weights: dict[str, list[int]] = field(default_factory=dict)


def has_routers(model: Any) -> bool:
    """Whether some layer of the model chooses between experts, be its router trained or frozen."""
    return next(router_weights(model), None) is not None


def routes_by_sequence(model: Any) -> bool:
    """Whether a model's adapter decides once for a whole text, by what its prompt is."""
    config = getattr(model, "peft_config", {}).get(getattr(model, "active_adapter", None))
    return isinstance(config, MoeLoraConfig) and config.selection.is_by_sequence


def chosen_by_task(model: Any, texts: Texts) -> dict[str, dict[str, int]]:
    """How many of each task's texts go to each expert, by name; empty if no router decides once for a text.

    Args:
        model: A model with or without an adapter.
        texts: Token ids of the prompts by task.
    """
    if not routes_by_sequence(model):
        return {}
    experts = model.peft_config[model.active_adapter].experts
    names = list(getattr(experts, "names", None) or map(str, range(experts.num_experts)))
    found = {}
    for task, prompts in texts.items():
        chosen = chosen_experts(model, [{"input_ids": prompt} for prompt in prompts])
        found[task] = {name: chosen.count(i) for i, name in enumerate(names)} | {"base model": chosen.count(-1)}
    return found


@torch.no_grad()
def chosen_experts(model: Any, prompts: Sequence[Mapping[str, Sequence[int]]], batch_size: int = 8) -> list[int]:
    """The expert that each prompt goes to, of a model whose router decides once for a sequence.

    Args:
        model: The model, with a mixture.
        prompts: `input_ids` of each.
        batch_size: Prompts at once.

    Returns:
        Numbers of experts; -1 for none, which leaves a prompt to the base model.
    """
    found = []
    for batch in batches(prompts, batch_size, model.device):
        with record_routing(model) as listener:
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        load_TE = listener.records[0].routing.load_TE()
        first_BE = load_TE.view(*batch["input_ids"].shape, -1)[:, 0]
        found += [int(row_E.argmax()) if bool(row_E.any()) else -1 for row_E in first_BE]
    return found


def token_views(model: Any, tokenizer: Any, texts: Texts) -> list[TokenView]:
    """What single tokens of the first texts of each task do; see `collect`."""
    return _gather(model, tokenizer, {task: rows[:TEXTS_A_TASK] for task, rows in texts.items()}, TEXTS_A_TASK)[1]


def collect(model: Any, tokenizer: Any, texts: Texts, *, batch_size: int) -> tuple[RoutingMap, list[TokenView]]:
    """Run texts through a model and record where their tokens go.

    Args:
        model: A model with routers, in evaluation mode.
        tokenizer: Its tokenizer.
        texts: Task to the token ids of its texts; two at least, because the halves of a task show how much of a
            difference between tasks is chance.
        batch_size: Texts at once.
    """
    counts, views = _gather(model, tokenizer, texts, batch_size)
    return RoutingMap.of(counts), views


def _gather(
    model: Any, tokenizer: Any, texts: Texts, batch_size: int
) -> tuple[dict[str, list[RoutingCounts]], list[TokenView]]:
    counts: dict[str, list[RoutingCounts]] = {}
    views = []
    for task, rows in track(texts.items(), "recording the routing"):
        halves = counts[task] = [RoutingCounts(), RoutingCounts()]
        order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
        first = range(min(TEXTS_A_TASK, len(rows)))
        shown = {index: TokenView(task, _pieces(tokenizer, rows[index])) for index in first}
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            _run(model, [rows[index] for index in batch], batch, halves, shown)
        views += list(shown.values())
    return counts, views


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    return [tokenizer.decode([token]) for token in ids[:TOKENS_A_TEXT]]


def _run(
    model: Any,
    rows: Sequence[Sequence[int]],
    indices: Sequence[int],
    halves: Sequence[RoutingCounts],
    shown: Mapping[int, TokenView],
) -> None:
    width = max(map(len, rows))
    ids = torch.zeros((len(rows), width), dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for place, row in enumerate(rows):
        ids[place, : len(row)] = torch.tensor(row)
        mask[place, : len(row)] = 1
    words = {"input_ids": ids.to(model.device), "attention_mask": mask.to(model.device)}
    with torch.no_grad(), record_routing(model) as recorder:
        model(**words, **without_logits(model, model.device), use_cache=False)
    for record in recorder.records:
        valid_BS = record.valid_T.reshape(len(rows), width)
        load_BSE = record.routing.load_TE().reshape(len(rows), width, -1)
        gates_BSE = record.routing.gates_TE().reshape(len(rows), width, -1)
        for half in (0, 1):
            places = [place for place, index in enumerate(indices) if index % 2 == half]
            if places:
                counts_E = (load_BSE[places] * valid_BS[places].unsqueeze(-1)).sum((0, 1)).cpu()
                halves[half].add(record.layer, counts_E)
        for place, index in enumerate(indices):
            if index in shown:
                count = len(shown[index].tokens)
                weights_S, experts_S = gates_BSE[place, :count].float().max(-1)
                shown[index].experts[record.layer] = experts_S.tolist()
                shown[index].weights[record.layer] = (100 * weights_S).round().int().tolist()
    for place, index in enumerate(indices):
        halves[index % 2].tokens += int(mask[place].sum())


def statistics(routing: RoutingMap) -> dict[str, Any]:
    """What the loads say, in numbers.

    Returns:
        "entropy": of the load over all tasks, 1 at perfect balance, by layer and their mean. "dead": experts that get
        less than a hundredth of their fair share on all tasks together, by layer and their sum. "similarity": 1 where
        two tasks use the experts alike, 0 where they share none. "chance": the same of two halves of one task's texts.
    """
    loads = routing.loads.mean(0)
    experts = loads.shape[-1]
    entropy = -(loads * np.log(np.clip(loads, 1e-12, None))).sum(-1) / np.log(max(experts, 2))
    dead = (loads < DEAD / experts).sum(-1)
    similarity = 1 - routing.distances()
    return {
        "experts": experts,
        "entropy": {
            "mean": _round(entropy.mean()),
            "layers": dict(zip(routing.layers, map(_round, entropy), strict=True)),
        },
        "dead": {"sum": int(dead.sum()), "layers": dict(zip(routing.layers, map(int, dead), strict=True))},
        "similarity": {
            task: dict(zip(routing.tasks, map(_round, row), strict=True))
            for task, row in zip(routing.tasks, similarity, strict=True)
        },
        "chance": dict(zip(routing.tasks, (_round(1 - noise) for noise in routing.noise), strict=True)),
    }


def _round(value: Any) -> float:
    return round(float(value), 4)


def as_json(routing: RoutingMap, views: Sequence[TokenView]) -> dict[str, Any]:
    """Everything about the routing, for `routing.json`; `moelora report` reads it."""
    return {
        **routing.to_json(),
        "statistics": statistics(routing),
        "texts": [
            {
                "task": view.task,
                "tokens": view.tokens,
                "experts": [view.experts[layer] for layer in routing.layers],
                "weights": [view.weights[layer] for layer in routing.layers],
            }
            for view in views
        ],
    }


def suite_texts(suite: Suite, rows: int) -> dict[str, list[str]]:
    """The first rows of each task with their right answers, as texts.

    Args:
        suite: The tasks.
        rows: Rows of each task; at least two.
    """
    texts = {}
    for name, task in suite.tasks.items():
        documents = task.eval_docs
        chosen = (documents[index] for index in range(min(max(rows, 2), len(documents))))
        texts[suite.label(name)] = ["".join(_spaced(task, right_request(task, row))) for row in chosen]
    return texts


def _spaced(task: Any, request: tuple[str, str]) -> tuple[str, str]:
    """Answers of generation have no space of their own before them."""
    prompt, answer = request
    joined = task.OUTPUT_TYPE == "multiple_choice" or prompt.endswith((" ", "\n"))
    return prompt, answer if joined else f" {answer}"


def analyse(
    model: Any, tokenizer: Any, suite: Suite, *, name: str, rows: int, batch_size: int, folder: Path
) -> dict[str, Any] | None:
    """Record the routing of a suite's rows and leave `routing.json` and the pictures in a folder.

    Args:
        model: The model; without routers nothing is done.
        tokenizer: Its tokenizer.
        suite: The tasks.
        name: Of the model, for the pictures.
        rows: Rows of each task.
        batch_size: Rows at once.
        folder: Where the files go.

    Returns:
        The statistics; None without routers.
    """
    if not has_routers(model):
        return None
    model.eval()
    texts = {task: [tokenizer(text)["input_ids"] for text in found] for task, found in suite_texts(suite, rows).items()}
    routing, views = collect(model, tokenizer, texts, batch_size=batch_size)
    folder.mkdir(parents=True, exist_ok=True)
    heatmaps.draw(routing, name, folder / "heatmaps")
    write_atomically(folder / "routing.json", json.dumps(as_json(routing, views)) + "\n")
    return statistics(routing)
