"""Rows of `moelora compose`: the LoRAs as one mixture, by each recipe.

Shape suffixes: B sequences, S tokens of a sequence, E experts.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from peft import PeftModel

from eval.after_training.bench import PROBE_ROWS, Bench, Row, exact_limit, furthest, size_of, timed
from eval.scoring.routing import chosen_experts
from moelora.compose import from_loras
from moelora.routing.prompts import prompt_of
from moelora.routing.run import batch_facts

RIGHT = 0.9
"""The least share of fresh prompts that centroids must send to their own expert, and of the LoRAs' own score."""


@contextmanager
def composed(bench: Bench, router: Any, folder: Path, names: list[str] | None = None) -> Iterator[tuple[Any, float]]:
    """The LoRAs as a mixture that was saved and loaded again, and the seconds that making and saving it took.

    Args:
        bench: The bench.
        router: As in `from_loras`.
        folder: Where it is saved.
        names: The tasks to take; None takes all.
    """
    loras = {name: str(path) for name, path in bench.loras.items() if names is None or name in names}
    examples = {name: bench.fit[name] for name in loras}

    def make() -> None:
        model = from_loras(bench.base, loras, router, examples=examples)
        try:
            model.save_pretrained(str(folder))
        finally:
            model.unload()

    _, seconds = timed(make)
    with bench.adapted(folder) as model:
        yield model, seconds


def uniform(bench: Bench) -> Iterator[Row]:
    """The mean of all LoRAs, against PEFT's own weighted sum of them."""
    folder = bench.work / "uniform"
    names = bench.names
    with composed(bench, "uniform", folder) as (model, seconds):
        ours, score = bench.logits(model), bench.exact(model)
    theirs = PeftModel.from_pretrained(bench.base, str(bench.loras[names[0]]), adapter_name=names[0])
    for name in names[1:]:
        theirs.load_adapter(str(bench.loras[name]), adapter_name=name)
    theirs.add_weighted_adapter(names, [1 / len(names)] * len(names), "mean", combination_type="cat")
    theirs.set_adapter("mean")
    expected = bench.logits(theirs.float().eval())
    theirs.unload()
    words: Any = {"verb": "compose uniform", "on": _loras(bench), "before": _before(bench), "after": size_of(folder)}
    compared = "max logit difference to PEFT's `add_weighted_adapter`"
    yield Row(**words, compared=compared, value=furthest(ours, expected), limit=exact_limit(expected), seconds=seconds)
    yield _score(bench, words, score)


def task(bench: Bench) -> Iterator[Row]:
    """A LoRA by the number of the task, against that LoRA alone."""
    folder = bench.work / "task"
    with composed(bench, "task", folder) as (model, seconds):
        ours: dict[str, torch.Tensor] = {}
        for number, name in enumerate(bench.names):
            with batch_facts(task_ids=[number] * len(bench.probe(name)["input_ids"])):
                ours |= bench.logits(model, [name])
    expected = alone(bench)
    yield Row(
        verb="compose task",
        on=_loras(bench),
        compared="max logit difference to each LoRA alone",
        value=furthest(ours, expected),
        limit=exact_limit(expected),
        before=_before(bench),
        after=size_of(folder),
        seconds=seconds,
    )


def centroids(bench: Bench) -> Iterator[Row]:
    """A LoRA by the prompt: where prompts go, what the answers are worth, and that a chosen LoRA is as if alone."""
    folder = bench.work / "centroids"
    with composed(bench, "centroids", folder) as (model, seconds):
        chosen = {name: experts_of(bench, model, name) for name in bench.names}
        ours, score = bench.logits(model), bench.exact(model)
    right = [expert == number for number, name in enumerate(bench.names) for expert in chosen[name]]
    words: Any = {"verb": "compose centroids", "on": _loras(bench), "before": _before(bench), "after": size_of(folder)}
    compared = f"share of {len(right)} fresh prompts that go to their own expert"
    yield Row(**words, compared=compared, value=mean(right), limit=RIGHT, at_least=True, seconds=seconds)
    expected = alone(bench)
    both = [name for number, name in enumerate(bench.names) if set(chosen[name][:PROBE_ROWS]) == {number}]
    value = furthest({n: ours[n] for n in both}, expected) if both else float("nan")
    compared = "max logit difference to the own LoRA alone, of prompts that go to it"
    yield Row(**words, compared=compared, value=value, limit=exact_limit(expected))
    yield _score(bench, words, score)


def arrow(bench: Bench) -> Iterator[Row]:
    """Arrow's prototypes."""
    folder = bench.work / "arrow"
    with composed(bench, "arrow", folder) as (model, seconds):
        loss, score = bench.loss(model), bench.exact(model)
    words: Any = {"verb": "compose arrow", "on": _loras(bench), "before": _before(bench), "after": size_of(folder)}
    yield better_than_base(bench, loss, **words, seconds=seconds)
    yield _score(bench, words, score)


def others(bench: Bench) -> Iterator[Row]:
    """A router to be trained, PHATGOOSE and LoRAHub, with few steps."""
    recipes: dict[str, Any] = {
        "topk, not trained": "topk",
        "phatgoose, 8 steps": {"kind": "phatgoose", "steps": 8, "batch_size": 4},
        "lorahub, 12 steps": {"kind": "lorahub", "steps": 12},
    }
    for name, router in recipes.items():
        folder = bench.work / name.partition(",")[0]
        with composed(bench, router, folder) as (model, seconds):
            loss = bench.loss(model)
        words: Any = {"verb": f"compose {name}", "on": _loras(bench), "seconds": seconds}
        yield better_than_base(bench, loss, **words, before=_before(bench), after=size_of(folder))


def scores(bench: Bench) -> dict[str, dict[str, float]]:
    """Exact answers of the base alone, and of each LoRA alone on its own task: what compositions are held against."""
    own: dict[str, float] = {}
    for name, folder in bench.loras.items():
        with bench.adapted(folder) as model:
            own |= bench.exact(model, [name])
    return {"base model": bench.exact(bench.base), "each LoRA on its own task": own}


def alone(bench: Bench) -> dict[str, torch.Tensor]:
    """Logits of each LoRA alone on the probe of its own task."""
    found: dict[str, torch.Tensor] = {}
    for name, folder in bench.loras.items():
        with bench.adapted(folder) as model:
            found |= bench.logits(model, [name])
    return found


def experts_of(bench: Bench, model: Any, name: str) -> list[int]:
    """The expert that each of a task's fresh prompts goes to; -1 is none."""
    return chosen_experts(model, [{"input_ids": prompt_of(row)} for row in bench.tests[name]])


def better_than_base(bench: Bench, loss: float, **words: Any) -> Row:
    """A row of something that is no exact copy: it must leave a lower loss than the base model without any adapter."""
    base = bench.base_loss
    return Row(compared="loss on fresh problems", value=loss, limit=base, **words)


def _score(bench: Bench, words: dict[str, Any], score: dict[str, float]) -> Row:
    kind = words["verb"].split()[-1]
    bench.scores[kind] = score
    base, own = (mean(bench.scores[name].values()) for name in ("base model", "each LoRA on its own task"))
    count = sum(len(result.problems) for result in bench.problems)
    return Row(
        **words,
        compared=f"exact answers to {count} fresh problems",
        value=mean(score.values()),
        limit=RIGHT * own if kind == "centroids" else base,
        at_least=True,
        aside={"base": base, "each LoRA on its own task": own},
    )


def _loras(bench: Bench) -> str:
    return f"{len(bench.loras)} LoRAs"


def _before(bench: Bench) -> Any:
    return size_of(*bench.loras.values())
