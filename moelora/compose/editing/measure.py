"""What a model does on data: which experts its tokens go to, how alike the router treats experts, and the loss.

Shape suffixes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.errors import ComposeError
from moelora.routing.run import record_routing


@dataclass(frozen=True, eq=False)
class SiteRouting:
    """The routing of one mixture over some data.

    Attributes:
        usage_E: Share of the choices that fell on each expert; of dense selection, of the weights.
        similarity_EE: Cosine of the experts' router logits over the tokens.
    """

    usage_E: Tensor
    similarity_EE: Tensor


@torch.no_grad()
def measure_routing(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> dict[str, SiteRouting]:
    """Run a model on batches and see where its tokens go; padding does not count.

    Args:
        model: A model with a moelora adapter.
        batches: Inputs of its forward.

    Returns:
        What was found, by the name of the wrapped module.

    Raises:
        MoeLoraError: If the model has no mixture, or there is no batch.
    """
    counts: dict[str, Tensor] = {}
    grams: dict[str, Tensor] = {}
    with _in_eval(model), record_routing(model) as listener:
        for batch in batches:
            model(**batch)
            for record in listener.records:
                # an expert that is switched off has no logit
                logits_TE = record.routing.logits_TE[record.valid_T].double().nan_to_num(neginf=0.0)
                counts[record.layer] = counts.get(record.layer, 0) + record.counts_E().double()
                grams[record.layer] = grams.get(record.layer, 0) + logits_TE.t() @ logits_TE
            listener.clear()
    if not counts:
        raise ComposeError("no mixture ran on the data; allowed: a model with experts, and at least one row.")
    found = {}
    for layer, gram_EE in grams.items():
        norm_E = gram_EE.diagonal().sqrt().clamp_min(1e-12)
        similarity_EE = (gram_EE / norm_E / norm_E.unsqueeze(1)).float().cpu()
        found[layer] = SiteRouting((counts[layer] / counts[layer].sum()).float().cpu(), similarity_EE)
    return found


@torch.no_grad()
def mean_loss(model: nn.Module, batches: Iterable[Mapping[str, Any]]) -> float:
    """Mean negative log-likelihood of the labelled tokens of a causal language model, in nats.

    Args:
        model: The model.
        batches: Inputs of its forward, with `labels` (-100 where a token does not count).

    Raises:
        ComposeError: If no token has a label.
    """
    total, count = 0.0, 0
    with _in_eval(model):
        for batch in batches:
            logits = model(**batch).logits[:, :-1].float()
            targets = batch["labels"][:, 1:].to(logits.device)
            total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
            count += int((targets != -100).sum())
    if count == 0:
        raise ComposeError("no token of the data has a label, so there is no loss; allowed: rows with an answer.")
    return total / count


@contextmanager
def _in_eval(model: nn.Module) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)
