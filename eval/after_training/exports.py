"""Rows of `moelora export`: what a mixture is in other forms."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from eval.after_training.bench import Bench, Row, exact_limit, furthest, size_of, timed
from eval.after_training.compositions import better_than_base
from moelora.export import compare, distill_lora, export_loras, read_mixlora, to_native_moe, write_mixlora

STEPS = 8
"""Of the distillation."""


def native_moe(bench: Bench) -> Iterator[Row]:
    """The mixture and its base as one native mixture of experts, in fp32."""
    output = bench.work / "native-moe"
    moe, seconds = timed(lambda: to_native_moe(bench.mixture, output, dtype="float32"))
    # rows without padding, since both generate from them
    prompts = [torch.tensor([row["input_ids"]]) for rows in bench.tests.values() for row in rows[:1]]
    native = AutoModelForCausalLM.from_pretrained(output, dtype=torch.float32, experts_implementation="eager").eval()
    with bench.adapted(bench.mixture) as model:
        found = [compare(model, native, ids) for ids in prompts]
    del native
    size = size_of(output)
    shutil.rmtree(output)  # gigabytes, which nothing reads any more
    words: dict[str, Any] = {"on": "the mixture and its base", "before": size_of(bench.mixture), "after": size}
    largest = max(each.largest_logit for each in found)
    yield Row(
        verb="export --to native-moe",
        **words,
        compared=f"max logit difference to the adapter, {moe.dtype}",
        value=max(each.logit_difference for each in found),
        limit=exact_limit({"": torch.tensor(largest)}),
        seconds=seconds,
        aside={"largest logit": largest},
    )
    yield Row(
        verb="export --to native-moe",
        **words,
        compared=f"share of {len(found)} texts with the same greedy tokens",
        value=sum(each.same_greedy for each in found) / len(found),
        limit=1.0,
        at_least=True,
    )


def loras(bench: Bench) -> Iterator[Row]:
    """A mixture by centroids as the LoRAs it was made of, and the uniform one as a single LoRA."""
    source, output = bench.work / "centroids", bench.work / "loras"
    _, seconds = timed(lambda: export_loras(source, output))
    worst, limits, folders = [], [], []
    for name, lora in bench.loras.items():
        with bench.adapted(lora) as model:
            expected = bench.logits(model, [name])
        folders.append(output / name)
        with bench.adapted(output / name) as model:
            worst.append(furthest(bench.logits(model, [name]), expected))
        limits.append(exact_limit(expected))
    yield Row(
        verb="export --to lora",
        on=f"{len(worst)} LoRAs by centroids",
        compared="max logit difference of a LoRA to the one that went in",
        value=max(worst),
        limit=min(limits),
        before=size_of(source),
        after=size_of(*folders),
        seconds=seconds,
    )
    source, output = bench.work / "uniform", bench.work / "one-lora"
    _, seconds = timed(lambda: export_loras(source, output))
    with bench.adapted(source) as model:
        expected = bench.logits(model)
    with bench.adapted(output) as model:
        ours = bench.logits(model)
    yield Row(
        verb="export --to lora",
        on="uniform mixture",
        compared="max logit difference of the one LoRA",
        value=furthest(ours, expected),
        limit=exact_limit(expected),
        before=size_of(source),
        after=size_of(output),
        seconds=seconds,
    )


def one_lora(bench: Bench) -> Iterator[Row]:
    """The mixture distilled into one LoRA."""
    output = bench.work / "distilled"
    rank = 2 * bench.config.adapter["r"] if "r" in bench.config.adapter else 8
    with bench.adapted(bench.mixture) as model:
        found, seconds = timed(
            lambda: distill_lora(
                model, output, rank=rank, train=bench.fit_batches(), held_out=bench.batches(), steps=STEPS
            )
        )
    with bench.adapted(output) as model:
        loss = bench.loss(model)
    trained = found.scores[f"after {STEPS} steps"]
    yield better_than_base(
        bench,
        loss,
        verb=f"export --to lora --rank {rank} --steps {STEPS}",
        on="the mixture",
        before=size_of(bench.mixture),
        after=size_of(output),
        seconds=seconds,
        aside={"mixture": found.scores["mixture"].loss, "base": bench.base_loss, "KL to the mixture": trained.kl},
    )


def mixlora(bench: Bench) -> Iterator[Row]:
    """The mixture as a folder of MixLoRA's authors, and back."""
    theirs, ours = bench.work / "mixlora", bench.work / "mixlora-back"
    _, seconds = timed(lambda: read_mixlora(write_mixlora(bench.mixture, theirs), ours))
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (bench.mixture, ours))
    same = [name for name in before if name in after and torch.equal(before[name], after[name])]
    yield Row(
        verb="export --to mixlora and --to moelora",
        on="the mixture",
        compared=f"share of {len(before.keys() | after.keys())} tensors that are equal to the bit",
        value=len(same) / len(before.keys() | after.keys()),
        limit=1.0,
        at_least=True,
        before=size_of(bench.mixture),
        after=size_of(theirs),
        seconds=seconds,
    )
