"""The loss of each row.

Shape suffixes: N rows, S positions of a batch, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moelora.compose.tokens import batches
from moelora.errors import RunError
from moelora.progress import track

Example = Mapping[str, Sequence[int]]
"""A tokenised row, with labels where it has an answer."""

BATCH = 8
"""Rows at once."""


def losses_of_rows(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens of each row, [N], in nats and fp32.

    Args:
        model: A causal language model.
        batch: Inputs of its forward with `labels`, -100 where a token does not count.

    Raises:
        RunError: If a row has no labelled token behind its first one.
    """
    # with the labels, by which routing by sequence knows where the prompt ends
    logits_NSV = model(**batch).logits[:, :-1]
    targets_NS = batch["labels"][:, 1:]
    counted_NS = targets_NS != -100
    count_N = counted_NS.sum(1)
    if int(count_N.min()) == 0:
        raise RunError("a row that is held out has no token of an answer, so it has no loss; allowed: an answer each.")
    of_tokens = F.cross_entropy(logits_NSV[counted_NS].float(), targets_NS[counted_NS], reduction="none")
    row = counted_NS.nonzero()[:, 0]
    return torch.zeros(len(count_N), device=of_tokens.device).index_add(0, row, of_tokens) / count_N


@torch.no_grad()
def row_losses(model: nn.Module, examples: Sequence[Example], batch_size: int = BATCH) -> list[float]:
    """The loss of each row, see `losses_of_rows`.

    Args:
        model: A causal language model in eval mode.
        examples: Tokenised rows with labels.
        batch_size: Rows at once.
    """
    device = next(model.parameters()).device
    parts = track(batches(examples, batch_size, device), "scoring rows", math.ceil(len(examples) / batch_size))
    return [loss for batch in parts for loss in losses_of_rows(model, batch).tolist()]
