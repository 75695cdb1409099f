"""Rows of `moelora expert`: the experts of a trained mixture edited."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

from eval.after_training.bench import Bench, Row, exact_limit, furthest, size_of, timed
from eval.after_training.compositions import better_than_base, composed, experts_of
from moelora.compose import (
    add_experts,
    cut_ranks,
    drop_experts,
    fit_router_rows,
    freeze_experts,
    measure_routing,
    merge_experts,
    split_lora,
    switch_experts,
)
from moelora.compose.editing import Edit, read_stacked
from moelora.compose.tokens import batches


def unchanged(bench: Bench) -> Iterator[Row]:
    """Freezing half of the experts, and switching one off and on."""
    E = _num_experts(bench)
    with bench.adapted(bench.mixture) as model:
        before = bench.logits(model)
        switch_experts(model, {0: False})
        off = bench.logits(model)
        switch_experts(model, {0: True})
        on = bench.logits(model)
    output = bench.work / "frozen"
    frozen = list(range(1, E, 2))
    _, seconds = timed(lambda: freeze_experts(bench.mixture, output, frozen))
    with bench.adapted(output) as model:
        after = bench.logits(model)
    words: dict[str, Any] = {"on": _mixture(bench), "before": size_of(bench.mixture)}
    yield Row(
        verb=f"expert freeze {len(frozen)}",
        **words,
        after=size_of(output),
        compared="max logit difference to before",
        value=furthest(after, before),
        limit=exact_limit(before),
        seconds=seconds,
    )
    yield Row(
        verb="switch an expert off and on",
        **words,
        compared="max logit difference to before",
        value=furthest(on, before),
        limit=0.0,
        aside={"while it is off": furthest(off, before)},
    )


def approximate(bench: Bench) -> Iterator[Row]:
    """Adding, dropping, merging and cutting experts that are chosen token by token."""
    E, r = _num_experts(bench), read_stacked(bench.mixture).config.experts.r
    with bench.adapted(bench.mixture) as model:
        before = bench.loss(model)
        routing, routing_seconds = timed(lambda: measure_routing(model, bench.fit_batches()))
    work = bench.work
    edits = {
        "add 1": lambda: add_experts(bench.mixture, work / "added"),
        "drop 1": lambda: drop_experts(bench.mixture, work / "dropped", [E - 1]),
        f"merge to {E - 1}": lambda: merge_experts(bench.mixture, work / "merged", num_experts=E - 1, routing=routing),
        f"cut to rank {r - 1}": lambda: cut_ranks(bench.mixture, work / "cut", rank=r - 1),
    }
    if E > 3:
        edits[f"merge to {E // 2}"] = lambda: merge_experts(
            bench.mixture, work / "halved", num_experts=E // 2, routing=routing
        )
    for name, edit in edits.items():
        done, seconds = timed(edit)
        with bench.adapted(done.folder) as model:
            loss = bench.loss(model)
        yield better_than_base(
            bench,
            loss,
            verb=f"expert {name}",
            on=_mixture(bench),
            **_sizes(bench.mixture, done),
            seconds=seconds + (routing_seconds if name.startswith("merge") else 0),
            aside={"before": before, "base": bench.base_loss},
        )


def by_centroid(bench: Bench) -> Iterator[Row]:
    """The last LoRA's place added to a mixture of the others, routed by centroids, and dropped again."""
    *old, new = bench.names
    before, added, dropped = (
        bench.work / name for name in ("centroids-but-one", "centroids-added", "centroids-dropped")
    )
    with composed(bench, {"kind": "centroids", "unknown": False}, before, old) as (model, _):
        logits = bench.logits(model, old)

    def add() -> Edit:
        rows = fit_router_rows(bench.base, batches(bench.fit[new], 8, bench.base.device), before, new)
        return add_experts(before, added, names=[new], rows=rows)

    edit, seconds = timed(add)
    with bench.adapted(added) as model:
        chosen = {name: experts_of(bench, model, name) for name in bench.names}
        stay = [name for name in old if len(old) not in chosen[name]]
        after = bench.logits(model, stay)
    on = f"{len(old)} LoRAs by centroids"
    yield Row(
        verb="expert add 1",
        on=on,
        compared="max logit difference to before, of prompts of old tasks",
        value=furthest(after, logits) if stay else float("nan"),
        limit=exact_limit(logits),
        **_sizes(before, edit),
        seconds=seconds,
        aside={
            "share of old tasks' prompts that stay": _share([e != len(old) for name in old for e in chosen[name]]),
            "share of the new task's that go to it": _share([e == len(old) for e in chosen[new]]),
        },
    )
    edit, seconds = timed(lambda: drop_experts(added, dropped, [new]))
    with bench.adapted(dropped) as model:
        after = bench.logits(model, old)
    yield Row(
        verb="expert drop the added",
        on=f"{len(bench.names)} LoRAs by centroids",
        compared="max logit difference to before it was added",
        value=furthest(after, logits),
        limit=0.0,
        **_sizes(added, edit),
        seconds=seconds,
    )


def split(bench: Bench) -> Iterator[Row]:
    """One LoRA into experts, with its function unchanged."""
    name, lora = next(iter(bench.loras.items()))
    with bench.adapted(lora) as model:
        expected = bench.logits(model)
    forms: dict[Any, dict[str, Any]] = {"rank_one": {}, "copies": {"num_experts": 4, "top_k": 2}}
    for into, words in forms.items():
        output = bench.work / f"split-{into}"
        edit, seconds = timed(partial(split_lora, lora, output, into=into, **words))
        with bench.adapted(output) as model:
            ours = bench.logits(model)
        yield Row(
            verb=f"expert split into {into.replace('_', '-')}",
            on=f"LoRA of {name}",
            compared="max logit difference to the LoRA",
            value=furthest(ours, expected),
            limit=exact_limit(expected),
            **_sizes(lora, edit),
            seconds=seconds,
        )


def _share(which: list[bool]) -> float:
    return sum(which) / len(which)


def _sizes(before: Path, edit: Edit) -> dict[str, Any]:
    return {"before": size_of(before), "after": size_of(edit.folder)}


def _num_experts(bench: Bench) -> int:
    return read_stacked(bench.mixture).num_experts


def _mixture(bench: Bench) -> str:
    config = read_stacked(bench.mixture).config
    return f"{config.preset or 'mixture'}, {config.experts.num_experts} experts of rank {config.experts.r}"
