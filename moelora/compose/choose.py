"""Which LoRAs of a pool to compose, by a few labelled rows.

Shape suffixes: R, Q ranks of two LoRAs, D input features, O output features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from moelora.compose.pool import Untouched, check_fit, check_names, named_sources
from moelora.compose.sources import LoraSource, read_lora
from moelora.compose.tokens import batches, check_rows
from moelora.errors import ComposeError
from moelora.inject.base_modules import base_modules
from moelora.progress import track

Factors = Mapping[str, tuple[Tensor, Tensor]]
"""A [R, D] and B [O, R] by the name of the linear."""


@dataclass(frozen=True, eq=False)
class Chosen:
    """What was chosen of a pool, and why.

    Attributes:
        names: The chosen LoRAs, best first.
        losses: Mean loss of a token of the rows' answers under each LoRA of the pool alone.
        nearest: For each chosen one but the first the largest cosine with those before it.
    """

    names: list[str]
    losses: dict[str, float]
    nearest: dict[str, float]


@torch.no_grad()
def choose(
    base: Any,
    pool: Mapping[str, str | Path] | Sequence[str | Path],
    examples: Sequence[Mapping[str, Sequence[int]]],
    count: int,
    *,
    diversity: float = 0.5,
    batch_size: int = 8,
    check_base_name: bool = True,
) -> Chosen:
    """Choose LoRAs that do well on a few rows and differ from each other.

    One after the other the LoRA with the largest

        (1 - diversity) * quality_e + diversity * (1 - max over the chosen c of cos(B_e A_e, B_c A_c))

    is taken (maximal marginal relevance). Quality is the loss on the rows under the LoRA alone, from 0 for the highest
    of the pool to 1 for the lowest; the first choice is by quality. The cosine is that of the products over all linears
    with their scalings, of which no product is formed: <B_e A_e, B_c A_c> = sum((B_e^T B_c) * (A_e A_c^T)). One LoRA at
    a time is on the model, and two at a time are in memory.

    Args:
        base: The base model; it is as it was afterwards.
        pool: As `loras` of `from_loras`.
        examples: Tokenised rows with labels.
        count: How many to choose; all, in their order, of a smaller pool.
        diversity: From 0, the lowest losses alone, to 1, after the first the cosines alone.
        batch_size: Rows of a forward.
        check_base_name: As in `from_loras`.

    Raises:
        ComposeError: If a LoRA cannot be an expert or does not fit, or a row has no answer.
    """
    check_rows(examples, "the examples", base.get_input_embeddings().weight.shape[0])
    if not examples or not all(any(label != -100 for label in row.get("labels", ())[1:]) for row in examples):
        found = "one has none" if examples else "there are none"
        raise ComposeError(
            f"LoRAs are chosen by rows with answers, and {found}; allowed: at least one row, with labels."
        )
    if count < 1 or not 0 <= diversity <= 1:
        raise ComposeError(
            f"count={count}, diversity={diversity}; allowed: a count of at least 1, a diversity of 0 to 1."
        )
    sources = {name: read_lora(name, source) for name, source in named_sources(pool).items()}
    check_names(base, list(sources.values()), check_base_name)
    modules = dict(base_modules(base))
    for source in sources.values():
        check_fit(modules, source, type(base).__name__)
    losses = {
        name: _loss(base, source, examples, batch_size) for name, source in track(sources.items(), "trying LoRAs")
    }
    low, high = min(losses.values()), max(losses.values())
    quality = {name: (high - loss) / (high - low) if high > low else 1.0 for name, loss in losses.items()}
    norms = {name: _inner(factors, factors) ** 0.5 for name, factors in map(_loaded, sources.values())}
    names: list[str] = []
    cosines = dict.fromkeys(sources, -1.0)
    nearest: dict[str, float] = {}
    while len(names) < min(count, len(sources)):
        worth = {
            name: quality[name] if not names else (1 - diversity) * quality[name] + diversity * (1 - cosines[name])
            for name in sources
            if name not in names
        }
        best = max(worth, key=lambda name: worth[name])
        if names:
            nearest[best] = cosines[best]
        names.append(best)
        _, of_best = _loaded(sources[best])
        for name in sources.keys() - set(names):
            norm = norms[name] * norms[best]
            cosine = _inner(_loaded(sources[name])[1], of_best) / norm if norm > 0 else 0.0
            cosines[name] = max(cosines[name], cosine)
    return Chosen(names, losses, nearest)


def _loss(base: Any, source: LoraSource, examples: Sequence[Mapping[str, Sequence[int]]], batch_size: int) -> float:
    """Mean loss of a labelled token, with one LoRA on the base."""
    untouched = Untouched(base)
    model = PeftModel.from_pretrained(base, source.source).eval()
    try:
        total, tokens = 0.0, 0
        for batch in batches(examples, batch_size, base.device):
            labelled = int((batch["labels"][:, 1:] != -100).sum())
            total += float(model(**batch).loss) * labelled
            tokens += labelled
        return total / tokens
    finally:
        untouched.restore(model)


def _loaded(source: LoraSource) -> tuple[str, dict[str, tuple[Tensor, Tensor]]]:
    """Its name, and its factors with the scaling in B, in fp32."""
    factors = source.factors()
    return source.name, {site: (a.float(), b.float() * source.scaling(site)) for site, (a, b) in factors.items()}


def _inner(one: Factors, other: Factors) -> float:
    """The inner product of two LoRAs' products over all linears."""
    total = 0.0
    for site in one.keys() & other.keys():
        (a_RD, b_OR), (a_QD, b_OQ) = one[site], other[site]
        total += float(((b_OR.t() @ b_OQ).double() * (a_RD @ a_QD.t()).double()).sum())
    return total
