"""Draws of experts that do not depend on the random state, so that runs cut otherwise draw alike."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

from moelora.routing.decision import Routing
from moelora.scores.base import RouterInput, Scored
from moelora.selection.draw import Draw

# What the two blocks draw in the trainer's forward and in the two others; the same for each micro-batch.
DRAWS = (0, 1, 1, 2, 2, 0)


@contextmanager
def fixed_draws(draws: Sequence[int] = DRAWS) -> Iterator[None]:
    """Inside, blocks that draw in training take these one after the other, again and again."""
    given_draws = itertools.cycle(draws)

    def select(self: Draw, scored: Scored, given: RouterInput) -> Routing:
        if not given.training:
            return Routing(scored.logits_TE, scored.probs_TE, scored.scores_TE, ids_TK=None)
        ids_T1 = torch.full((len(given.x_TD), 1), next(given_draws))
        return Routing(scored.logits_TE, scored.probs_TE, torch.ones(ids_T1.shape), ids_T1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Draw, "select", select)
        yield
